"""The preparation of images inside a model: resizing and normalisation.

A model has several methods that take images and call each other: `forward`, `forward_routed` of a routed model, and
`extract_features`. A hook on the model would only apply to the first. Therefore the class of the model is replaced by a
subclass in which each of these methods prepares the images, but only once if they call each other. The state dict, the
protocols and the names of modules do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.precision import full_precision
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import patch_size_of

# The methods of a model that take images.
TAKES_IMAGES = ("forward", "forward_routed", "extract_features")
Colour = tuple[float, float, float]


def prepare_inputs(
    model: nn.Module,
    *,
    normalisation: tuple[Colour, Colour] | None = None,
    resize: int | None = None,
    image_size: int,
) -> nn.Module:
    """Add the preparation of images to a model, in place.

    Args:
        model: A model without preparation of images. With `resize`, it must take images of this side.
        normalisation: Mean and standard deviation of each colour, for pixels in [0, 1]; None for no normalisation.
        resize: Side to which images are resized (bilinear, antialiased); None to keep the size.
        image_size: Side of the images in pixels.

    Returns:
        The model. If it has patches, `patch_size` is the side of a patch in pixels before resizing, or None if this is
        not an integer.

    Raises:
        ConfigError: The model is routed, and the side of its patches is not an integer.
    """
    if resize is not None and resize != image_size:
        _scale_patches(model, resize, image_size)
        # Row i contains the weights of pixel i of the result. On a GPU, matrix products have a deterministic gradient,
        # unlike the kernels for resizing.
        rows = F.interpolate(
            torch.eye(image_size)[None, None], (resize, image_size), mode="bilinear", antialias=True
        )[0, 0]
        model.register_buffer("input_resizing", rows, persistent=False)
    if normalisation is not None:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalisation)
        model.register_buffer("input_mean", mean, persistent=False)
        model.register_buffer("input_std", std, persistent=False)
    model._preparing = False  # type: ignore[assignment]
    model.__class__ = _preparing(type(model))  # type: ignore[arg-type]
    return model


def _scale_patches(model: nn.Module, resize: int, image_size: int) -> None:
    """Convert the attribute `patch_size` to pixels before resizing."""
    if (size := patch_size_of(model)) is None:
        return
    scaled, rest = divmod(size * image_size, resize)
    if rest and isinstance(model, RoutedModel):
        raise ConfigError(
            f"model.resize: expected a size at which patches are whole pixels of the {image_size}x{image_size} images, "
            f"got {resize}, at which a patch of {size} pixels is {size * image_size / resize:g}"
        )
    model.patch_size = None if rest else scaled  # type: ignore[assignment]


@functools.cache
def _preparing(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a model class whose methods prepare the images."""
    methods = {name: _prepared(getattr(kind, name)) for name in TAKES_IMAGES if hasattr(kind, name)}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**methods, **names})


def _prepared(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that prepares its images unless it is called by another method that has prepared them."""

    @functools.wraps(method)
    def call(self: nn.Module, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._preparing:
            return method(self, images, *args, **kwargs)
        self._preparing = True  # type: ignore[assignment]
        try:
            return method(self, _prepare(self, images), *args, **kwargs)
        finally:
            self._preparing = False  # type: ignore[assignment]

    return call


def _prepare(model: nn.Module, images: Tensor) -> Tensor:
    """Resize and normalise images (B, 3, H, W) in [0, 1], in full precision."""
    buffers = dict(model.named_buffers(recurse=False))
    with full_precision(images.device):
        if (rows := buffers.get("input_resizing")) is not None:
            images = rows @ images.float() @ rows.T
        if (mean := buffers.get("input_mean")) is not None:
            images = (images.float() - mean) / buffers["input_std"]
    return images.contiguous(memory_format=torch.channels_last)
