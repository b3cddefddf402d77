"""Measuring a mixture of experts: the accuracy on every task, and which experts the gates rely on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.engine.measuring.evaluate import Metrics, share
from backdoorbench_moe.moe.merging import gate_weights
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.effects import mean_of
from backdoorbench_moe.ops.images import batch_size_for
from backdoorbench_moe.records import GateShares


@dataclass(frozen=True, kw_only=True)
class GatePass:
    """To which experts a mixture sends N images, or texts.

    Attributes:
        weights: (layers, N, E) float32 on the CPU: the weight of each expert's output, mean over an image's patches, or
            over some positions of a text. It sums to 1 over the experts.
        layers: Names of the layers.
    """

    weights: Tensor
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RoutedPass(GatePass):
    """What a mixture does with N images.

    Attributes:
        predicted: (N,) int64, on the images' device.
    """

    predicted: Tensor


@torch.inference_mode()
def routed_pass(model: nn.Module, images: Tensor, *, precision: str) -> RoutedPass:
    """Pass (N, C, H, W) uint8 images through a mixture, in evaluation mode."""
    assert isinstance(model, RoutedModel)
    model.eval()
    predicted, weights = [], []
    layers: tuple[str, ...] = ()
    for batch in images.split(batch_size_for(images)):
        output = forward_routed(model, batch, precision=precision)
        predicted.append(output.logits.argmax(1))
        weights.append(torch.stack([gate_weights(each).mean(2) for each in output.routing]).float().cpu())
        layers = tuple(each.layer for each in output.routing)
    return RoutedPass(predicted=torch.cat(predicted), weights=torch.cat(weights, 1), layers=layers)


@dataclass(frozen=True)
class MixturePass:
    """What a mixture does with the test images of its tasks, and with marked ones.

    Attributes:
        tasks: The test images of each task.
        marked: The marked images; None if there are none.
        unmarked: The same images without the mark; None for a run without an attack.
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
    """The accuracy on each task, their mean, and what it is in percent of the accuracy of each task's benign expert.

    Args:
        found: The pass.
        tests: The test images of each task.
        expert_ba: The accuracy of each task's benign expert on its own task, in percent; None if it is not known.
    """
    hits = [each.predicted == test.labels for each, test in zip(found.tasks, tests, strict=True)]
    return accuracy_metrics(hits, expert_ba)


def accuracy_metrics(hits: Sequence[Tensor], expert_ba: Sequence[float] | None) -> Metrics:
    """The accuracy on each task, their mean, and what it is in percent of the accuracy of each task's benign expert.

    Args:
        hits: For each task (N,) bool, which answers are right.
        expert_ba: The accuracy of each task's benign expert on its own task, in percent; None if it is not known.
    """
    tasks = [share(each) for each in hits]
    metrics = {"ba": mean_share(tasks)} | {f"task/{e}.ba": each for e, each in enumerate(tasks)}
    if expert_ba is not None:
        # The interval is for these experts: their accuracies are taken as they are.
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
    """How much the gates rely on some experts, in percent of all weights, mean over layers and patches.

    Args:
        tasks: The pass over the test images of each task.
        marked: That over marked images; None if there are none.
        experts: Numbers of the experts.

    Returns:
        `harm_share`: their share for marked images; `clean_share`: their share for the images of all tasks;
        `own_share`: the share of each of them for the images of its own task. A mean over one image has no interval.
    """
    chosen = list(experts)
    parts = {
        "clean_share": torch.cat([each.weights for each in tasks], 1)[..., chosen].sum(-1),
        "own_share": torch.cat([tasks[e].weights[..., e] for e in chosen], 1),
    }
    if marked is not None:
        parts["harm_share"] = marked.weights[..., chosen].sum(-1)
    # Weights that are rounded to float32 may add up to a little more than 1.
    means = {name: asdict(mean_of(100 * values.mean(0).clamp(max=1))) for name, values in parts.items()}
    return {name: {k: v for k, v in row.items() if v is not None} for name, row in means.items()}


def gate_shares(tasks: Sequence[GatePass], marked: GatePass | None) -> list[GateShares]:
    """The share of each expert by layer, in percent, for the record: for each task's images and for marked ones."""
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
