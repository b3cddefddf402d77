"""One batched pass over the test images, from which all routing statistics are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.engine.inference import classes_of, forward_routed
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput
from backdoorbench_moe.ops import routing

# Small enough for the cache: on a CPU, batches of 500 took 1.5 times as long as batches of 100.
BATCH = 100


@dataclass(frozen=True)
class LayerPass:
    """Routing of N images in one routed layer, on the CPU.

    Attributes:
        layer: Name of the layer.
        gates_over: Axis over which the gates sum to 1, see `ops.routing.gates_over`.
        selected: (N, E, P) bool, whether an expert processes a patch.
        gate_mass: (N, E) float32, sum of the gates of the patches that an expert processes.
        entropy: (N, D) float32 in [0, 1], normalised entropy of each of an image's D gate distributions: D is P
            if the gates sum to 1 over the experts, otherwise E.
    """

    layer: str
    gates_over: str
    selected: Tensor
    gate_mass: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class RoutedPass:
    """Predictions and routing of N images in a routed model.

    Attributes:
        predicted: (N,) int64, predicted classes.
        layers: The routed layers, in the order of the forward pass.
    """

    predicted: Tensor
    layers: tuple[LayerPass, ...]


@dataclass(frozen=True)
class PairedPass:
    """Passes of a routed model over the N clean test images and over the M triggered ones that count for ASR.

    Attributes:
        clean: The pass over the N clean test images.
        triggered: The pass over the M triggered images; None without a trigger.
        divergence: For each layer (M, E) float32, Jensen-Shannon divergence in nats between the gates of an image
            and those of its triggered version, see `ops.routing.js_divergence`; None without a trigger.
    """

    clean: RoutedPass
    triggered: RoutedPass | None
    divergence: tuple[Tensor, ...] | None


class _Collector:
    """Collects the predictions, selections, gate masses and entropies of batches, but not the gates, to save memory."""

    def __init__(self) -> None:
        self.predicted: list[Tensor] = []
        self.layers: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def add(self, output: RoutedOutput, axes: Sequence[str], gates: Sequence[Tensor]) -> None:
        self.predicted.append(classes_of(output.logits).cpu())
        self.layers = self.layers or [[] for _ in axes]
        for batches, layer, axis, probabilities in zip(self.layers, output.routing, axes, gates, strict=True):
            mass = (layer.gates.float() * layer.selected).sum(-1)
            entropy = routing.normalised_entropy(probabilities, axis).float()
            batches.append((layer.selected.cpu(), mass.cpu(), entropy.cpu()))

    def collect(self, names: Sequence[str], axes: Sequence[str]) -> RoutedPass:
        layers = [
            LayerPass(name, axis, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
            for name, axis, batches in zip(names, axes, self.layers, strict=True)
        ]
        return RoutedPass(torch.cat(self.predicted), tuple(layers))


@torch.inference_mode()
def run_pass(
    model: RoutedModel,
    images: Tensor,
    triggered: Triggered | None,
    *,
    precision: str,
    batch_size: int = BATCH,
) -> PairedPass:
    """Pass clean images and their triggered versions through a routed model, batch by batch.

    Args:
        model: The model, in evaluation mode.
        images: (N, C, H, W) uint8, the clean images.
        triggered: The triggered versions of those that count for ASR; None without a trigger.
        precision: "fp32" or "bf16".
        batch_size: Number of clean images in a batch. Each batch is followed by the triggered versions of its images.
    """
    clean, stamped = _Collector(), _Collector()
    divergence: list[list[Tensor]] = []
    names: list[str] = []
    axes: list[str] = []
    for start in range(0, len(images), batch_size):
        output = forward_routed(model, images[start : start + batch_size], precision=precision)
        if not names:
            names = [layer.layer for layer in output.routing]
            axes = [routing.gates_over(layer.gates) for layer in output.routing]
        gates = _distributions(output, axes)
        clean.add(output, axes, gates)
        if triggered is None:
            continue
        edges = torch.tensor([start, start + batch_size], device=triggered.places.device)
        first, last = torch.searchsorted(triggered.places, edges).tolist()
        if first == last:
            continue
        rows = triggered.places[first:last] - start
        changed = forward_routed(model, triggered.images[first:last], precision=precision)
        after = _distributions(changed, axes)
        stamped.add(changed, axes, after)
        divergence.append(
            [
                routing.js_divergence(a[rows], b, axis).float().cpu()
                for a, b, axis in zip(gates, after, axes, strict=True)
            ]
        )
    if triggered is None:
        return PairedPass(clean.collect(names, axes), None, None)
    shifts = tuple(torch.cat(parts) for parts in zip(*divergence, strict=True))
    return PairedPass(clean.collect(names, axes), stamped.collect(names, axes), shifts)


def _distributions(output: RoutedOutput, axes: Sequence[str]) -> list[Tensor]:
    return [
        routing.distributions(layer.gates, axis) for layer, axis in zip(output.routing, axes, strict=True)
    ]
