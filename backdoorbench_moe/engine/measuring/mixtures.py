"""Measure a mixture of experts: the accuracy on every task, and the gate weights of the experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.inference import classes_of, forward_routed
from backdoorbench_moe.engine.measuring.evaluate import Metrics, share
from backdoorbench_moe.moe.merging import gate_weights
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.effects import mean_of
from backdoorbench_moe.ops.images import batch_size_for
from backdoorbench_moe.records import GateShares


@dataclass(frozen=True, kw_only=True)
class GatePass:
    """The gate weights of a mixture for N images or texts.

    Attributes:
        weights: (layers, N, E) float32 on the CPU: the weight of each expert's output, averaged over the patches of an
            image or some positions of a text. The weights of the experts sum to 1.
        layers: Names of the layers.
    """

    weights: Tensor
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RoutedPass(GatePass):
    """The gate weights and predictions of a mixture for N images.

    Attributes:
        predicted: (N,) int64 on the images' device, the predicted classes.
    """

    predicted: Tensor


@torch.inference_mode()
def routed_pass(model: nn.Module, images: Tensor, *, precision: str) -> RoutedPass:
    """Pass (N, C, H, W) uint8 images through a mixture, in evaluation mode.

    Raises:
        RecordError: The model's logits contain NaN.
    """
    assert isinstance(model, RoutedModel)
    model.eval()
    logits, weights = [], []
    layers: tuple[str, ...] = ()
    for batch in images.split(batch_size_for(images)):
        output = forward_routed(model, batch, precision=precision)
        logits.append(output.logits)
        weights.append(torch.stack([gate_weights(each).mean(2) for each in output.routing]).float().cpu())
        layers = tuple(each.layer for each in output.routing)
    return RoutedPass(predicted=classes_of(torch.cat(logits)), weights=torch.cat(weights, 1), layers=layers)


@dataclass(frozen=True)
class MixturePass:
    """Gate weights and predictions of a mixture for the test images of its tasks, and for marked images.

    Attributes:
        tasks: Those for the test images of each task.
        marked: Those for the marked images; None if there are none.
        unmarked: Those for the same images without the mark; None for a run without an attack.
    """

    tasks: Sequence[RoutedPass]
    marked: RoutedPass | None
    unmarked: RoutedPass | None


def mixture_pass(
    model: nn.Module,
    tests: Sequence[Split],
    marked: Tensor | None,
    unmarked: Tensor | None,
    *,
    precision: str,
) -> MixturePass:
    """Pass the test images of all tasks, and marked images, through a mixture."""

    def passed(images: Tensor | None) -> RoutedPass | None:
        return None if images is None else routed_pass(model, images, precision=precision)

    tasks = [routed_pass(model, test.images, precision=precision) for test in tests]
    return MixturePass(tasks, passed(marked), passed(unmarked))


def task_metrics(found: MixturePass, tests: Sequence[Split], expert_ba: Sequence[float] | None) -> Metrics:
    """Compute the accuracy on each task, the mean, and the ratio to the accuracy of the benign experts.

    Args:
        found: The predictions for the test images.
        tests: The test images of each task.
        expert_ba: The accuracy of each task's benign expert on its own task, in percent; None if it is unknown.
    """
    hits = [each.predicted == test.labels for each, test in zip(found.tasks, tests, strict=True)]
    return accuracy_metrics(hits, expert_ba)


def accuracy_metrics(hits: Sequence[Tensor], expert_ba: Sequence[float] | None) -> Metrics:
    """Compute the accuracy on each task, the mean, and the ratio to the accuracy of the benign experts.

    Args:
        hits: (N,) bool for each task, which answers are correct.
        expert_ba: The accuracy of each task's benign expert on its own task, in percent; None if it is unknown.

    Returns:
        `ba`, the mean over the tasks; `task/e.ba` for each task e. With `expert_ba`, also `task/e.expert_ba`, and
        `overall`, the mean of the accuracies in percent of those of the experts.
    """
    tasks = [share(each) for each in hits]
    metrics = {"ba": mean_share(tasks)} | {f"task/{e}.ba": each for e, each in enumerate(tasks)}
    if expert_ba is not None:
        # The interval is conditional on these experts: their accuracies are treated as exact.
        kept = [
            {key: number if key == "n" else 100 * number / own for key, number in each.items()}
            for each, own in zip(tasks, expert_ba, strict=True)
            if own > 0
        ]
        if kept:
            metrics["overall"] = {**mean_share(kept), "n": metrics["ba"]["n"]}
        metrics |= {
            f"task/{e}.expert_ba": {"value": own, "n": tasks[e]["n"]} for e, own in enumerate(expert_ba)
        }
    return metrics


def mean_share(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of shares of independent images, with a 95% interval.

    Source:
        Zou and Donner, "Construction of confidence limits about effect measures: a general approach", Statistics in
        Medicine 2008 (the method of variance estimates recovery).
    """
    value = sum(each["value"] for each in shares) / len(shares)
    below, above = (
        math.sqrt(sum((each["value"] - each[end]) ** 2 for each in shares)) / len(shares)
        for end in ("low", "high")
    )
    total = sum(each["n"] for each in shares)
    return {"value": value, "n": total, "low": value - below, "high": value + above}


def share_metrics(tasks: Sequence[GatePass], marked: GatePass | None, experts: Sequence[int]) -> Metrics:
    """Compute the total gate weight of some experts, in percent, averaged over layers and patches.

    Args:
        tasks: Gate weights for the test images of each task.
        marked: Gate weights for marked images; None if there are none.
        experts: Numbers of the experts.

    Returns:
        `harm_share`: their weight for marked images; `clean_share`: their weight for the images of all tasks;
        `own_share`: the weight of each of them for the images of its own task. A mean over one image has no interval.
    """
    chosen = list(experts)
    parts = {
        "clean_share": torch.cat([each.weights for each in tasks], 1)[..., chosen].sum(-1),
        "own_share": torch.cat([tasks[e].weights[..., e] for e in chosen], 1),
    }
    if marked is not None:
        parts["harm_share"] = marked.weights[..., chosen].sum(-1)
    # The sum of weights in float32 may exceed 1 by a rounding error.
    means = {name: asdict(mean_of(100 * values.mean(0).clamp(max=1))) for name, values in parts.items()}
    return {name: {k: v for k, v in row.items() if v is not None} for name, row in means.items()}


def gate_shares(tasks: Sequence[GatePass], marked: GatePass | None) -> list[GateShares]:
    """Gate weights of each expert by layer, in percent, for the images of each task and for marked images."""
    layers = tasks[0].layers
    means = [100 * each.weights.mean(1) for each in tasks]
    harm = None if marked is None else 100 * marked.weights.mean(1)
    return [
        GateShares(
            layer=name,
            tasks=[each[place].tolist() for each in means],
            marked=None if harm is None else harm[place].tolist(),
        )
        for place, name in enumerate(layers)
    ]
