"""Triggered images that another tool has produced, used instead of a formula."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.options import FilePath
from backdoorbench_moe.paths import expand
from backdoorbench_moe.triggers.base import Trigger

CHUNK = 256
TENSORS = {"keys": torch.int64, "images": torch.uint8, "places": torch.int64, "training": torch.uint8}


class StoredTrigger(Trigger):
    """Replace an image with its stored triggered version, if there is one.

    This trigger is for attacks without a known formula and those that consist of networks, such as SSBA, LIRA and the
    input-aware attack. `bbmoe import backdoorbench` writes the file from a folder of BackdoorBench. A test image is
    recognised by its pixels, a training image by its place in the training set. Images without a stored version are not
    changed. A run with this trigger is refused unless all images to stamp are stored.

    Args:
        file: File with the images; None for a trigger that stamps nothing.
        seed: Not used, as nothing is random.

    Raises:
        ConfigError: The file is missing or has the wrong format.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {
        "test_shape_type_and_range": "without a file it stamps nothing",
        "test_forms_keep_shape_type_and_range": "without a file it stamps nothing",
        "test_the_noise_form_is_another_stamp_than_the_triggers": "the file has one version of each image",
    }

    def __init__(self, *, file: FilePath | None = None, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.file = file

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """The content of the file: `keys` (M,) in ascending order with `images`, and `places` (n,) with `training`."""
        if self.file is None:
            return {}
        return read_stored(expand(self.file, "stored: file"))

    def stamp(self, images: Tensor) -> Tensor:
        """Replace the images that are stored."""
        if self.file is None or not len(images):
            return images.clone()
        return self._replaced(images, image_keys(images), "keys", "images")

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Replace the training images that are stored."""
        if self.file is None or not len(images):
            return images.clone()
        return self._replaced(images, places, "places", "training")

    def stamp_noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Replace the training images that are stored; BackdoorBench stores noise images like the others."""
        return self.stamp_training(images, places)

    def missing(self, images: Tensor) -> int:
        """Return how many of (N, C, H, W) uint8 test images have no stored version."""
        known = self._tensors.get("keys", torch.empty(0, dtype=torch.int64))
        return sum(int((~torch.isin(keys.cpu(), known)).sum()) for keys in _chunk_keys(images))

    def missing_places(self, places: Tensor) -> int:
        """Return how many of (n,) int64 places of the training set have no stored image."""
        known = self._tensors.get("places", torch.empty(0, dtype=torch.int64))
        return int((~torch.isin(places.cpu(), known)).sum())

    def _replaced(self, images: Tensor, keys: Tensor, names: str, content: str) -> Tensor:
        known, stored = self._tensors[names], self._tensors[content]
        if not len(known) or stored.shape[1:] != images.shape[1:]:
            # The canvas has another size, such as the grey image on which every trigger is tested.
            return images.clone()
        keys = keys.cpu()
        rows = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        found = (known[rows] == keys).view(-1, 1, 1, 1).to(images.device)
        new = stored[rows].to(images.device).to(images.dtype) / 255
        return torch.where(found, new, images)


def image_keys(images: Tensor) -> Tensor:
    """Return a number for each image by which it is recognised.

    Args:
        images: (B, C, H, W) float in [0, 1], multiples of 1/255.

    Returns:
        (B,) int64: the sum of the pixels times random 64-bit factors, modulo 2^64.
    """
    pixels = (images.detach().float() * 255).round().long().flatten(1)
    ends = torch.iinfo(torch.int64)
    factors = torch.randint(ends.min, ends.max, pixels.shape[1:], generator=generator(0, "stored images"))
    return (pixels * factors.to(pixels.device)).sum(1)


def _chunk_keys(images: Tensor) -> Iterator[Tensor]:
    """Yield the keys of (N, C, H, W) uint8 images in chunks, since the computation takes 20 times their memory."""
    for start in range(0, max(1, len(images)), CHUNK):
        yield image_keys(images[start : start + CHUNK] / 255)


def write_stored(path: Path, clean: Tensor, images: Tensor, places: Tensor, training: Tensor) -> None:
    """Write the file of a `StoredTrigger`.

    Args:
        path: The file.
        clean: (M, 3, H, W) uint8, test images without the trigger.
        images: (M, 3, H, W) uint8, the same images with the trigger.
        places: (n,) int64, places of training images, ascending.
        training: (n, 3, H, W) uint8, these training images with the trigger.
    """
    from safetensors.torch import save_file

    keys, order = torch.cat([*_chunk_keys(clean)]).sort(stable=True)
    save_file({"keys": keys, "images": images[order], "places": places, "training": training}, path)


def read_stored(path: Path) -> dict[str, Tensor]:
    """Read a file of `write_stored`. Raise ConfigError if it is missing or has the wrong format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"stored: file: {path}: expected stored images (safetensors): {error}") from None
    fits = tensors.keys() == TENSORS.keys() and all(
        tensors[name].dtype == kind for name, kind in TENSORS.items()
    )
    if not fits or any(
        tensors[keys].ndim != 1
        or tensors[content].ndim != 4
        or len(tensors[keys]) != len(tensors[content])
        or (tensors[keys].diff() < 0).any()
        for keys, content in (("keys", "images"), ("places", "training"))
    ):
        raise ConfigError(f"stored: file: {path}: expected ascending keys and places with an image for each")
    return tensors
