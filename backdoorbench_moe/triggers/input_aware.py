"""The trigger of the input-aware attack (Nguyen and Tran, NeurIPS 2020): a pattern and a mask for each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.precision import full_precision
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.triggers.trainable import TrainableTrigger

EPSILON = 1e-7
STAGES = 3
MOST_CHANNELS = 1024


class Generator(nn.Module):
    """An encoder-decoder with three stages, from images to maps in [0, 1].

    Departure: the maps of a stage are upsampled to their size before the pooling, so that images and tiles of any size
    can be used; the published code needs a multiple of 8.

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
        """Return the maps (B, out_channels, H, W) in [0, 1] of images (B, 3, H, W)."""
        maps, sizes = images, []
        for stage in self.down:
            sizes.append(maps.shape[-2:])
            maps = F.max_pool2d(stage(maps), 2, ceil_mode=True)
        maps = self.middle(maps)
        for stage, size in zip(self.up, reversed(sizes), strict=True):
            maps = stage(F.interpolate(maps, size, mode="bilinear"))
        return maps.tanh() / (2 + EPSILON) + 0.5


def _block(before: int, after: int, *, relu: bool = True) -> list[nn.Module]:
    # The type is explicit, because another default type would draw other weights.
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, 3, padding=1, dtype=torch.float32),
        nn.BatchNorm2d(after, momentum=0.05, dtype=torch.float32),
    ]
    return [*layers, nn.ReLU()] if relu else layers


class InputAware(TrainableTrigger):
    """Replace a few pixels of each image by a pattern; networks compute both from the image: x (1 - M(x)) + G(x) M(x).

    The mask network M is trained first, for sparse masks that differ between images. Then the pattern network G is
    trained together with the model. The attacker must control the training (`--attack training-control`). Images with
    the stamp of another image keep their labels (`poison.noise`), so that a stamp works only on the image it was
    computed for. With the applicator `patch`, every tile is such an image.

    Departures from the code: the model is trained for the epochs of the run; the learning rate of G is constant;
    distances are computed between images in [0, 1], which the code normalises first; the mask is trained on images
    without augmentation, and its optimizer uses torch's default betas; the gradients of G are reset before every step,
    whereas the code lets them accumulate.

    Args:
        density: Value of a mask pixel above which it is penalised, in (0, 1).
        diversity: Weight of the loss for different stamps on different images, at least 0.
        norm: Weight of the penalty on the density of the mask, at least 0.
        channels: Channels of the first stage of both networks, from 1 to 1024.
        mask_epochs: Passes over the training images to train the mask network, at least 1.
        lr: Learning rate of both networks, above 0; that of the mask drops to a tenth at 40% and 80% of its training.
        seed: Seed of the networks.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, section 4, and its code.
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
        """Stamp images with the pattern and the mask of the sources."""
        return images + (self._pattern(sources) - images) * self._mask(sources)

    def joint_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the diversity loss of the patterns."""
        return self.diversity * diversity_loss(images, others, self._pattern(images), self._pattern(others))

    def pretrained(self) -> nn.Module:
        """Return the mask network."""
        return self.networks["mask"]  # type: ignore[index]

    def pretrain_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the density penalty and the diversity loss of the masks."""
        masks, others_masks = self._mask(images), self._mask(others)
        dense = F.relu(masks - self.density).mean()
        return self.norm * dense + self.diversity * diversity_loss(images, others, masks, others_masks)

    def _pattern(self, images: Tensor) -> Tensor:
        return _in_single(self.networks["pattern"], images)  # type: ignore[index]

    def _mask(self, images: Tensor) -> Tensor:
        """Return masks (B, 1, H, W), almost all values close to 0 or 1."""
        maps = _in_single(self.networks["mask"], images)  # type: ignore[index]
        return (maps * 20 - 10).tanh() / (2 + EPSILON) + 0.5


def diversity_loss(images: Tensor, others: Tensor, maps: Tensor, others_maps: Tensor) -> Tensor:
    """Return the mean ratio of the distance between two images to the distance between their maps.

    Args:
        images: (B, 3, H, W).
        others: (B, 3, H, W); image b is compared with other image b.
        maps: (B, C, H, W), computed from `images`.
        others_maps: (B, C, H, W), computed from `others`.

    Returns:
        A scalar. Distances are root mean squares.

    Source:
        Nguyen and Tran, equation 5.
    """

    def distance(one: Tensor, other: Tensor) -> Tensor:
        # The gradient of the root is infinite at 0; the clamp sets it to 0 for equal images or maps.
        return (one - other).square().mean((1, 2, 3)).clamp(min=EPSILON**2).sqrt()

    return (distance(images, others) / (distance(maps, others_maps) + EPSILON)).mean()


def _in_single(network: nn.Module, images: Tensor) -> Tensor:
    """Apply a network in single precision, in which test images are stamped, whatever the precision of the run."""
    with full_precision(images.device):
        maps: Tensor = network(images.float())
    return maps
