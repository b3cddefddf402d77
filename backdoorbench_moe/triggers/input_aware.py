"""The input-aware trigger: another pattern, in another place, for every image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.triggers.trainable import TrainableTrigger

EPSILON = 1e-7
STAGES = 3
MOST_CHANNELS = 1024


class Generator(nn.Module):
    """An encoder and decoder with three stages, from images to maps in [0, 1].

    Departure: the maps of a stage are upsampled to the size that they had before the pooling, so that images and tiles
    of any size can be used; the published code needs a multiple of 8.

    Args:
        out_channels: Channels of the maps.
        channels: Channels of the first stage; each further one has twice as many.

    Source:
        The code of Nguyen and Tran, 2020, with 32 channels.
    """

    def __init__(self, out_channels: int, channels: int) -> None:
        super().__init__()
        widths = [channels << stage for stage in range(STAGES)]
        self.down = nn.ModuleList(
            nn.Sequential(*_block(before, width), *_block(width, width))
            for before, width in zip([3, *widths], widths, strict=False)
        )
        self.middle = nn.Sequential(*_block(widths[-1], widths[-1]))
        after = [*widths[-2::-1], out_channels]
        self.up = nn.ModuleList(
            nn.Sequential(*_block(width, width), *_block(width, following, relu=stage < STAGES - 1))
            for stage, (width, following) in enumerate(zip(widths[::-1], after, strict=True))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, out_channels, H, W) in [0, 1] of images (B, 3, H, W)."""
        maps, sizes = images, []
        for stage in self.down:
            sizes.append(maps.shape[-2:])
            maps = F.max_pool2d(stage(maps), 2, ceil_mode=True)
        maps = self.middle(maps)
        for stage, size in zip(self.up, reversed(sizes), strict=True):
            maps = stage(F.interpolate(maps, size, mode="bilinear"))
        return maps.tanh() / (2 + EPSILON) + 0.5


def _block(before: int, after: int, *, relu: bool = True) -> list[nn.Module]:
    # The type is named, because another default type would draw other weights.
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, 3, padding=1, dtype=torch.float32),
        nn.BatchNorm2d(after, momentum=0.05, dtype=torch.float32),
    ]
    return [*layers, nn.ReLU()] if relu else layers


class InputAware(TrainableTrigger):
    """Replace a few pixels of each image by a pattern, both chosen by networks: x (1 - M(x)) + G(x) M(x).

    The mask M is trained first, for sparse masks that differ between images. Then the pattern G is trained together
    with the model. The attacker must be in charge of the training (`--attack training-control`). Images that bear the
    stamp of another image keep their labels (`poison.noise`), so that each stamp works on its own image only.

    Departures from the code: the mask and the model are trained for as many epochs as the run says; the learning rate
    of G is constant; distances are between images in [0, 1], which the code normalises first; the mask is trained by
    Adam with torch's default betas. With the applicator `patch`, every tile is such an image.

    Args:
        density: Mean value of the mask that is not penalised, in (0, 1).
        diversity: Weight of the loss that asks for different stamps on different images, at least 0.
        norm: Weight of the mask's density in its loss, at least 0.
        channels: Channels of the first stage of both networks, from 1 to 1024.
        mask_epochs: Number of passes over the training images for which the mask is trained, at least 1.
        lr: Learning rate of both networks, above 0; that of the mask falls to a tenth at 40% and 80% of its training.
        seed: Seed of the networks.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Nguyen and Tran, "Input-aware dynamic backdoor attack", NeurIPS 2020, section 4, and its code.
    """

    tiny: ClassVar[Mapping[str, object]] = {"channels": 2, "mask_epochs": 1}

    def __init__(
        self,
        *,
        density: float = 0.032,
        diversity: float = 1.0,
        norm: float = 100.0,
        channels: int = 32,
        mask_epochs: int = 25,
        lr: float = 0.01,
        seed: int = 0,
    ) -> None:
        checks = {
            "density": (density, 0 < density < 1, "a number in (0, 1)"),
            "diversity": (diversity, 0 <= diversity < float("inf"), "a number of at least 0"),
            "norm": (norm, 0 <= norm < float("inf"), "a number of at least 0"),
            "channels": (channels, 1 <= channels <= MOST_CHANNELS, f"1 to {MOST_CHANNELS}"),
            "mask_epochs": (mask_epochs, mask_epochs >= 1, "at least 1"),
            "lr": (lr, 0 < lr < float("inf"), "a positive number"),
        }
        for name, (value, good, expected) in checks.items():
            if not good:
                raise ConfigError.expected(f"input-aware: {name}", expected, value)
        with seeded(seed, "networks"):
            networks = nn.ModuleDict({"pattern": Generator(3, channels), "mask": Generator(1, channels)})
        super().__init__(networks, lr=lr, seed=seed)
        self.density, self.diversity, self.norm = density, diversity, norm
        self.channels, self.mask_epochs = channels, mask_epochs
        self.pretrain_epochs = mask_epochs

    def stamp_from(self, images: Tensor, sources: Tensor) -> Tensor:
        """Stamp images with the pattern and the mask of other images."""
        return images + (self._pattern(sources) - images) * self._mask(sources)

    def joint_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """Diversity of the patterns."""
        return self.diversity * diversity_loss(images, others, self._pattern(images), self._pattern(others))

    def pretrained(self) -> nn.Module:
        """The mask."""
        return self.networks["mask"]  # type: ignore[index]

    def pretrain_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """Density and diversity of the masks."""
        masks, others_masks = self._mask(images), self._mask(others)
        dense = F.relu(masks - self.density).mean()
        return self.norm * dense + self.diversity * diversity_loss(images, others, masks, others_masks)

    def _pattern(self, images: Tensor) -> Tensor:
        return _in_single(self.networks["pattern"], images)  # type: ignore[index]

    def _mask(self, images: Tensor) -> Tensor:
        """Masks (B, 1, H, W), almost all values close to 0 or 1."""
        maps = _in_single(self.networks["mask"], images)  # type: ignore[index]
        return (maps * 20 - 10).tanh() / (2 + EPSILON) + 0.5


def diversity_loss(images: Tensor, others: Tensor, maps: Tensor, others_maps: Tensor) -> Tensor:
    """Return the mean ratio of the distance of two images to that of what a network makes of them.

    Args:
        images: (B, 3, H, W).
        others: (B, 3, H, W), image b is compared with other image b.
        maps: (B, C, H, W), made of `images`.
        others_maps: (B, C, H, W), made of `others`.

    Returns:
        A scalar. Distances are square roots of mean squares.

    Source:
        Nguyen and Tran, equation 5.
    """

    def distance(one: Tensor, other: Tensor) -> Tensor:
        # The gradient of a root at 0 is infinite; two equal images or maps have none.
        return (one - other).square().mean((1, 2, 3)).clamp(min=EPSILON**2).sqrt()

    return (distance(images, others) / (distance(maps, others_maps) + EPSILON)).mean()


def _in_single(network: nn.Module, images: Tensor) -> Tensor:
    """Apply a network in single precision, whatever the precision of the run: test images are stamped in it, too."""
    with torch.autocast(images.device.type, enabled=False):
        maps: Tensor = network(images.float())
    return maps
