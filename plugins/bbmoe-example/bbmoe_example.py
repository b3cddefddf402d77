"""A third-party package in one file: a trigger, an applicator and a defense."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.pruning import lowest
from backdoorbench_moe.ops.patches import tile, untile
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.shares import share_of
from backdoorbench_moe.triggers.base import Trigger


class Sinusoid(Trigger):
    """Six vertical stripes, added to every channel: amplitude * cos(2 pi * 6 * column / width).

    amplitude: in (0, 1], by default the 20 of 255 of Barni et al. (ICIP 2019), whose sine is zero on a 4x4 tile.
    """

    def __init__(self, *, amplitude: float = 20 / 255, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not 0 < amplitude <= 1:
            raise ConfigError.expected("sinusoid: amplitude", "a number in (0, 1]", amplitude)
        self.amplitude = amplitude

    def stamp(self, images: Tensor) -> Tensor:
        """Add the stripes; gradients flow where the sum stays within [0, 1]."""
        columns = torch.arange(images.shape[-1], device=images.device) / images.shape[-1]
        stripes = self.amplitude * torch.cos(2 * torch.pi * 6 * columns)
        return (images + stripes.to(images.dtype)).clamp(0, 1)


class RandomTiles(Applicator):
    """BadPatches on a `share` of the tiles, in (0, 1], at least one: drawn from `seed`, the same in every image."""

    def __init__(self, *, share: float = 0.5, patch_size: int = 4, seed: int = 0) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ConfigError.expected("random-tiles: share", "a number in (0, 1]", share)
        self.share, self.patch_size, self.seed = share, patch_size, seed

    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Stamp every tile, and keep the stamped ones where they were drawn."""
        tiles = tile(images, self.patch_size)
        count = len(tiles) // max(1, len(images))
        order = torch.randperm(count, generator=generator(self.seed, "random-tiles"))
        drawn = (order < max(1, round(self.share * count))).repeat(len(images)).to(images.device)
        return untile(torch.where(drawn[:, None, None, None], trigger(tiles), tiles), *images.shape[-2:])


class MagnitudePruning(Defense):
    """Set the smallest weights of every layer to zero, `ratio` of them, in [0, 1), then train on (Han et al., 2015)."""

    tiny: ClassVar = {"epochs": 1}  # so short in the conformance tests

    def __init__(self, *, ratio: float = 0.3, epochs: int = 5, clean_fraction: float = 0.05) -> None:
        super().__init__(clean_fraction=clean_fraction)
        if not 0 <= ratio < 1:
            raise ConfigError.expected("ratio", "a number in [0, 1)", ratio)
        if epochs < 0:
            raise ConfigError.expected("epochs", "a whole number from 0", epochs)
        self.ratio, self.epochs = ratio, epochs

    @torch.no_grad()
    def prune(self, weight: Tensor) -> None:
        """Set the floor(ratio * n) smallest of a tensor's n values to zero, in place."""
        smallest = lowest(weight.abs().flatten(), share_of(self.ratio, weight.numel()))
        weight.copy_(weight.flatten().index_fill(0, smallest, 0).view_as(weight))

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Prune, report, tune."""
        for weight in task.model.parameters():
            if weight.ndim > 1:
                self.prune(weight)
        task.report("pruned", task.model)
        task.tune(task.model, task.clean, epochs=self.epochs)
        return DefenseResult("tuned", task.model)
