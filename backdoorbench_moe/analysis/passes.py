"""The one batched pass over the test images that all routing statistics come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.analysis.subject import Subject
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.engine.triggered import Triggered
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput
from backdoorbench_moe.ops import routing

# So that a batch stays in the cache: on a CPU, 500 took half as long again as 100.
BATCH = 100


@dataclass(frozen=True)
class LayerPass:
    """What one routed layer did with N images, on the CPU.

    gates_over: the axis over which the gates are a distribution, see `ops.routing.gates_over`. selected:
    (N, E, P) bool. kept: (N, E) float32, sum of the gates of the patches an expert takes. entropy: (N, D)
    float32 in [0, 1], one for each distribution: D is P where the gates are over the experts, otherwise E.
    """

    layer: str
    gates_over: str
    selected: Tensor
    kept: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class RoutedPass:
    """What a model did with N images. predicted: (N,) int64. layers: first routed layer first."""

    predicted: Tensor
    layers: tuple[LayerPass, ...]


@dataclass(frozen=True)
class PairedPass:
    """All N clean test images, and the M of them that were triggered.

    divergence: for each layer (M, E) float32, Jensen-Shannon divergence in nats of the gates of an image and its
    triggered version, see `ops.routing.js_divergence`. triggered and divergence are None without a trigger.
    """

    clean: RoutedPass
    triggered: RoutedPass | None
    divergence: tuple[Tensor, ...] | None


class _Collector:
    """Gathers what is kept of each batch; the gates themselves are dropped."""

    def __init__(self) -> None:
        self.predicted: list[Tensor] = []
        self.layers: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def add(self, output: RoutedOutput, overs: Sequence[str], gates: Sequence[Tensor]) -> None:
        self.predicted.append(output.logits.argmax(1).cpu())
        self.layers = self.layers or [[] for _ in overs]
        for kept, layer, over, probabilities in zip(self.layers, output.routing, overs, gates, strict=True):
            weights = (layer.gates.float() * layer.selected).sum(-1)
            entropy = routing.normalised_entropy(probabilities, over).float()
            kept.append((layer.selected.cpu(), weights.cpu(), entropy.cpu()))

    def collect(self, names: Sequence[str], overs: Sequence[str]) -> RoutedPass:
        layers = [
            LayerPass(name, over, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
            for name, over, batches in zip(names, overs, self.layers, strict=True)
        ]
        return RoutedPass(torch.cat(self.predicted), tuple(layers))


@torch.inference_mode()
def run_pass(
    subject: Subject, model: RoutedModel, triggered: Triggered | None, *, batch_size: int = BATCH
) -> PairedPass:
    """Pass the clean test images, and with each batch the triggered versions of those in it that have one."""
    images = subject.images.test.images
    clean, stamped = _Collector(), _Collector()
    divergence: list[list[Tensor]] = []
    names: list[str] = []
    overs: list[str] = []
    for start in range(0, len(images), batch_size):
        output = forward_routed(model, images[start : start + batch_size], precision=subject.precision)
        if not names:
            names = [layer.layer for layer in output.routing]
            overs = [routing.gates_over(layer.gates) for layer in output.routing]
        gates = _distributions(output, overs)
        clean.add(output, overs, gates)
        if triggered is None:
            continue
        edges = torch.tensor([start, start + batch_size], device=triggered.places.device)
        first, last = torch.searchsorted(triggered.places, edges).tolist()
        if first == last:
            continue
        own = triggered.places[first:last] - start
        changed = forward_routed(model, triggered.images[first:last], precision=subject.precision)
        after = _distributions(changed, overs)
        stamped.add(changed, overs, after)
        divergence.append(
            [
                routing.js_divergence(a[own], b, over).float().cpu()
                for a, b, over in zip(gates, after, overs, strict=True)
            ]
        )
    if triggered is None:
        return PairedPass(clean.collect(names, overs), None, None)
    shifts = tuple(torch.cat(parts) for parts in zip(*divergence, strict=True))
    return PairedPass(clean.collect(names, overs), stamped.collect(names, overs), shifts)


def _distributions(output: RoutedOutput, overs: Sequence[str]) -> list[Tensor]:
    return [
        routing.distributions(layer.gates, over) for layer, over in zip(output.routing, overs, strict=True)
    ]
