"""Measuring a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.step import as_input
from backdoorbench_moe.moe.routed import RoutedModel, Routing
from backdoorbench_moe.ops.metrics import proportion

BATCH = 500
Metrics = dict[str, dict[str, float]]


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor, *, precision: str, batch_size: int = BATCH) -> Tensor:
    """Logits (N, classes) float32 of (N, C, H, W) uint8 images, in evaluation mode, on their device."""
    model.eval()
    found = []
    for start in range(0, len(images), batch_size):
        with autocast(images.device, precision):
            found.append(model(as_input(images[start : start + batch_size])).float())
    return torch.cat(found)


def routings(
    model: nn.Module, images: Tensor, *, precision: str, batch_size: int = BATCH
) -> Iterator[list[Routing]]:
    """Routing of every routed layer of (N, C, H, W) uint8 images, in evaluation mode: a list a batch, in order."""
    assert isinstance(model, RoutedModel)
    model.eval()
    for start in range(0, len(images), batch_size):
        with torch.inference_mode(), autocast(images.device, precision):
            routing = model.forward_routed(as_input(images[start : start + batch_size])).routing
        yield routing


def predict(model: nn.Module, images: Tensor, *, precision: str, batch_size: int = BATCH) -> Tensor:
    """Predicted classes (N,) int64 of (N, C, H, W) uint8 images, in evaluation mode, on their device."""
    return logits(model, images, precision=precision, batch_size=batch_size).argmax(1)


def count_hits(model: nn.Module, split: Split, *, precision: str) -> int:
    """How many images of the split are predicted as labelled."""
    return int((predict(model, split.images, precision=precision) == split.labels).sum())


def measure(
    model: nn.Module,
    test: Split,
    triggered: tuple[Split, Tensor] | None,
    *,
    precision: str,
    recovery: bool = False,
) -> Metrics:
    """BA over all clean test images; ASR over triggered ones that are not the wanted class already.

    triggered: as `triggered_test` gives them; None for a clean run. recovery: RA too, the share of the same
    triggered images that are called what they are.
    """
    metrics = {"ba": asdict(proportion(count_hits(model, test, precision=precision), len(test)))}
    if triggered is not None:
        split, true_labels = triggered
        predicted = predict(model, split.images, precision=precision)
        metrics["asr"] = asdict(proportion(int((predicted == split.labels).sum()), len(split)))
        if recovery:
            metrics["ra"] = asdict(proportion(int((predicted == true_labels).sum()), len(split)))
    return metrics
