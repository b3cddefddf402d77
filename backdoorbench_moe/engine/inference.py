"""Forward passes of a model on stored images or token ids: logits, predictions, features, losses and routing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.moe.structure import WithFeatures
from backdoorbench_moe.ops.images import Split, as_input, batch_size_for


def forward(model: nn.Module, images: Tensor, *, precision: str) -> Tensor:
    """Logits (B, classes) of one batch of (B, C, H, W) uint8 images, in the model's current mode."""
    with autocast(images.device, precision):
        logits: Tensor = model(as_input(images))
    return logits


def forward_routed(model: RoutedModel, images: Tensor, *, precision: str) -> RoutedOutput:
    """Logits and routing of one batch of (B, C, H, W) uint8 images, in the model's current mode."""
    with autocast(images.device, precision):
        return model.forward_routed(as_input(images))


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor, *, precision: str, batch_size: int | None = None) -> Tensor:
    """Logits (N, classes) float32 of (N, C, H, W) uint8 images, in evaluation mode, on their device.

    For token ids (N, T), the logits are (N, T, vocabulary).
    """
    model.eval()
    size = batch_size or batch_size_for(images)
    return torch.cat([forward(model, batch, precision=precision).float() for batch in images.split(size)])


def routings(
    model: nn.Module, images: Tensor, *, precision: str, batch_size: int | None = None
) -> Iterator[list[Routing]]:
    """Yield, batch by batch, the routing of every routed layer for (N, C, H, W) uint8 images, in evaluation mode.

    Token ids (N, T) may be given instead of images.
    """
    assert isinstance(model, RoutedModel)
    model.eval()
    for batch in images.split(batch_size or batch_size_for(images)):
        with torch.inference_mode():
            routing = forward_routed(model, batch, precision=precision).routing
        yield routing


@torch.inference_mode()
def features(model: WithFeatures, images: Tensor, *, precision: str) -> Tensor:
    """Features before the head, (N, D) float32, of (N, C, H, W) uint8 images, in evaluation mode, on their device."""
    assert isinstance(model, nn.Module)
    model.eval()
    found = []
    for batch in images.split(batch_size_for(images)):
        with autocast(batch.device, precision):
            found.append(model.extract_features(as_input(batch)).float())
    return torch.cat(found)


def losses(model: nn.Module, split: Split, *, precision: str, batch_size: int | None = None) -> Tensor:
    """Cross-entropy (N,) float32 of each of N images with its label, in evaluation mode, on their device."""
    found = logits(model, split.images, precision=precision, batch_size=batch_size)
    return nn.functional.cross_entropy(found, split.labels, reduction="none")


def predict(model: nn.Module, images: Tensor, *, precision: str, batch_size: int | None = None) -> Tensor:
    """Predicted classes (N,) int64 of (N, C, H, W) uint8 images, in evaluation mode, on their device.

    Raises:
        RecordError: The model's logits contain NaN.
    """
    return classes_of(logits(model, images, precision=precision, batch_size=batch_size))


def classes_of(logits: Tensor) -> Tensor:
    """Predicted classes or tokens (N,) int64 from logits (N, classes).

    Raises:
        RecordError: A logit is NaN, which `argmax` would take for the largest: the ASR would be that of the class with
            the first NaN.
    """
    if logits.isnan().any():
        raise RecordError("the model's logits contain NaN: its weights do, or its computation overflows")
    return logits.argmax(1)
