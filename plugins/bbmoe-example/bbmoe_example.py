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

    The source uses a sine, which would be zero on a 4x4 tile.

    Args:
        amplitude: In (0, 1]; the default is the source's.
        seed: Not used, since nothing is drawn.

    Raises:
        ConfigError: For an amplitude out of range.

    Source: Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019.
    """

    def __init__(self, *, amplitude: float = 20 / 255, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not 0 < amplitude <= 1:
            raise ConfigError.expected("sinusoid: amplitude", "a number in (0, 1]", amplitude)
        self.amplitude = amplitude

    def stamp(self, images: Tensor) -> Tensor:
        """Add the stripes to images (B, C, H, W) and clip the sum to [0, 1]."""
        columns = torch.arange(images.shape[-1], device=images.device) / images.shape[-1]
        stripes = self.amplitude * torch.cos(2 * torch.pi * 6 * columns)
        return (images + stripes.to(images.dtype)).clamp(0, 1)


class RandomTiles(Applicator):
    """BadPatches on a share of the tiles, which are drawn once and the same in every image.

    Args:
        share: Share of the tiles that are stamped, in (0, 1]; at least one tile is.
        patch_size: Side of a tile in pixels.
        seed: Seed that the tiles are drawn from.

    Raises:
        ConfigError: For a share out of range.
    """

    def __init__(self, *, share: float = 0.5, patch_size: int = 4, seed: int = 0) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ConfigError.expected("random-tiles: share", "a number in (0, 1]", share)
        self.share, self.patch_size, self.seed = share, patch_size, seed

    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Stamp every tile of images (B, C, H, W), and keep the stamped version of those that were drawn."""
        tiles = tile(images, self.patch_size)
        count = len(tiles) // max(1, len(images))
        order = torch.randperm(count, generator=generator(self.seed, "random-tiles"))
        drawn = (order < max(1, round(self.share * count))).repeat(len(images)).to(images.device)
        return untile(torch.where(drawn[:, None, None, None], trigger(tiles), tiles), *images.shape[-2:])


class MagnitudePruning(Defense):
    """Set the smallest weights of every layer to zero, then train the model on clean images.

    Args:
        ratio: Share of the weights that are set to zero, in [0, 1).
        epochs: Epochs of training, from 0.
        clean_fraction: See `Defense`.

    Raises:
        ConfigError: For an option out of range.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.
    """

    tuning_length: ClassVar = "epochs"  # Tables compare it with plain tuning of the same length.
    tiny: ClassVar = {"epochs": 1}  # Used by the conformance tests.

    def __init__(self, *, ratio: float = 0.3, epochs: int = 5, clean_fraction: float = 0.05) -> None:
        super().__init__(clean_fraction=clean_fraction)
        if not 0 <= ratio < 1:
            raise ConfigError.expected("ratio", "a number in [0, 1)", ratio)
        if epochs < 0:
            raise ConfigError.expected("epochs", "an integer of at least 0", epochs)
        self.ratio, self.epochs = ratio, epochs

    @torch.no_grad()
    def prune(self, weight: Tensor) -> None:
        """Set the floor(ratio * n) values of a tensor with the smallest magnitude to zero, in place."""
        smallest = lowest(weight.abs().flatten(), share_of(self.ratio, weight.numel()))
        weight.copy_(weight.flatten().index_fill(0, smallest, 0).view_as(weight))

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Prune every weight matrix, report the stage, and tune."""
        for weight in task.model.parameters():
            if weight.ndim > 1:
                self.prune(weight)
        task.report("pruned", task.model)
        task.tune(task.model, task.clean, epochs=self.epochs)
        return DefenseResult("tuned", task.model)
