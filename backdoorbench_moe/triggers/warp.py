"""The trigger of WaNet (Nguyen and Tran, ICLR 2021): a smooth distortion of the image."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.ops.ranges import check_integer
from backdoorbench_moe.ops.seeding import derive_seed, generator, uniform_at
from backdoorbench_moe.ops.warp import (
    add_offsets,
    control_grid,
    notebook_pixels,
    take_pixels,
    wanet_grid,
    warp_bilinear,
)
from backdoorbench_moe.triggers.base import Trigger

Sampling = Literal["bilinear", "truncate"]

MOST_POINTS = 1024


class Warp(Trigger):
    """Warp the image smoothly, as in WaNet.

    A grid of k x k random offsets, drawn once from `seed`, is upsampled to one offset for each pixel. All images are
    warped in the same way.

    The noise form (see `Trigger`) is WaNet's noise mode: the same warp plus a random offset of up to half a pixel along
    each axis, for each pixel of each image. The model thus learns to react to exactly this warp and to ignore similar
    ones. With "truncate", there is no noise form.

    Departure: WaNet draws new poison and noise images and offsets for every batch, like the attack `training-control`.
    With `data-poisoning`, they are drawn once, because an attacker who only poisons data cannot influence the batches.
    This attacker is weaker than the paper's.

    Args:
        grid_size: Number k of control points along each side of the grid, from 1 to 1024.
        strength: WaNet's s, above 0. In images of 32x32, with the default grid, the mean shift along each axis is about
            0.36 * `strength` pixels.
        sampling: "bilinear": pixel values are interpolated, as in WaNet. "truncate": the sampling coordinates are
            truncated to integers, as in the notebook of BadPatches, which also uses grid_size=2 and strength=0.25.
        seed: Seed of the control grid and of the noise form's offsets.

    Attributes:
        control_grid: The grid of offsets, divided by their mean absolute value, (1, 2, k, k) float32 on the CPU.
            Channel 0 holds the x offsets, channel 1 the y offsets.

    Raises:
        ConfigError: `grid_size` or `strength` is out of range.
        UnknownNameError: `sampling` is unknown.

    Source:
        Nguyen and Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021, equations 4 and 5, and its
        noise mode; the notebooks of BadPatches (arXiv 2505.01811).
    """

    def __init__(
        self, *, grid_size: int = 4, strength: float = 0.5, sampling: Sampling = "bilinear", seed: int = 0
    ) -> None:
        super().__init__(seed=seed)
        check_integer("warp: grid_size", grid_size, 1, MOST_POINTS)
        if not (math.isfinite(strength) and strength > 0):
            raise ConfigError.expected("warp: strength", "a number above 0", strength)
        if sampling not in get_args(Sampling):
            raise UnknownNameError("warp: sampling", sampling, get_args(Sampling))
        self.grid_size, self.strength, self.sampling = grid_size, strength, sampling
        self.control_grid = control_grid(grid_size, generator(seed, "warp"))
        self._fields: dict[object, Tensor] = {}

    def stamp(self, images: Tensor) -> Tensor:
        """Warp a batch (B, C, H, W) in [0, 1]. It is differentiable with respect to the images."""
        field = self._field(images)
        return take_pixels(images, field) if self.sampling == "truncate" else warp_bilinear(images, field)

    @property
    def has_noise(self) -> bool:
        """Whether the trigger has a noise form; true only for bilinear sampling."""
        return self.sampling == "bilinear"

    def stamp_noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Warp the images, and shift each pixel by an additional random offset of up to half a pixel along each axis.

        Args:
            images: (B, C, H, W) in [0, 1].
            places: (B,) int64, the index of each image in the training set. The random offsets are a function of it.

        Raises:
            ConfigError: The trigger has no noise form.
        """
        if not self.has_noise:
            return super().stamp_noise(images, places)
        height, width = images.shape[-2:]
        offsets = uniform_at(derive_seed(self.seed, "warp noise"), places.to(images.device), height, width, 2)
        grid = add_offsets(self._field(images), 2 * offsets - 1)
        return warp_bilinear(images, grid)

    def _field(self, images: Tensor) -> Tensor:
        """Return what to sample (see `_make_field`) for images of this size, on their device; cached.

        Sampling grids are float64 for float64 images and float32 for all others.
        """
        height, width = images.shape[-2:]
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        key = (height, width, images.device, dtype)
        if key not in self._fields:
            # Tensors that are created in inference mode cannot take part in a backward pass later.
            with torch.inference_mode(False):
                self._fields[key] = self._make_field(height, width, dtype).to(images.device)
        return self._fields[key]

    def _make_field(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Compute what each pixel samples: pixel indices for "truncate", or a sampling grid for "bilinear".

        They are computed on the CPU, so that all devices sample the same pixels.
        """
        if self.sampling == "truncate":
            # Always in float64: the sign of a very small offset must not depend on the precision of the images.
            return notebook_pixels(self.control_grid.double(), height, width, self.strength)
        return wanet_grid(self.control_grid.to(dtype), height, width, self.strength)
