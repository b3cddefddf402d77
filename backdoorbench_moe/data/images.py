"""Decoding and resizing, shared by the data sets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from backdoorbench_moe.data.base import Split, draw_subset
from backdoorbench_moe.errors import ConfigError, DataError

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp")
# These become RGB without loss; with transparency only where every pixel is opaque.
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA")
# More than any model here takes; what does not fit into memory is said as such.
MAX_SIDE = 8192
RESIZE_CHUNK = 1024
FILES_CHUNK = 64


def check_image_size(image_size: int) -> int:
    """Return `image_size` if it is a side in pixels. Raises ConfigError."""
    if not 1 <= image_size <= MAX_SIDE:
        raise ConfigError.expected("dataset: image_size", f"1 to {MAX_SIDE} pixels", image_size)
    return image_size


def read_images(paths: Sequence[Path], size: int, *, crop: bool) -> Tensor:
    """Decode files in parallel and resize them to (N, 3, size, size) uint8: bilinear, antialiased.

    crop: keep the aspect ratio, the shorter side becoming `size`, and cut out the middle; otherwise both
    sides become `size`.
    Raises DataError naming the first file that is damaged, missing, or of a mode that is not RGB's equal.
    """
    images = np.empty((len(paths), 3, size, size), np.uint8)

    def fill(start: int) -> None:
        for row, path in enumerate(paths[start : start + FILES_CHUNK], start):
            image = read_image(path)
            if image.size != (size, size):
                fit = ImageOps.fit if crop else Image.Image.resize
                image = fit(image, (size, size), Image.Resampling.BILINEAR)
            images[row] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(0, len(paths), FILES_CHUNK)))
    return torch.from_numpy(images)


def read_image(path: Path) -> Image.Image:
    """Decode one file as RGB. Raises DataError naming it, and its mode where that is not RGB's equal."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.load()
            image: Image.Image = file
            mode, clear = image.mode, image.has_transparency_data
            if mode in MODES and clear:
                image = image.convert("RGBA")
                clear = image.getchannel("A").histogram()[255] < image.width * image.height
            if mode in MODES and not clear:
                return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # A damaged file can fail in about any way inside its decoder.
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error
    what = f"mode {mode} with transparent pixels" if mode in MODES else f"mode {mode}"
    raise DataError(f"{path}: expected an RGB, grey or palette image without transparency, got {what}")


def subset_and_resize(split: Split, count: int | None, name: str, size: int) -> Split:
    """Keep `count` images of a split (`name` as in `draw_subset`), then resize: that may need much memory."""
    keep = draw_subset(len(split), count, name)
    whole = len(keep) == len(split)
    images, labels = (split.images, split.labels) if whole else (split.images[keep], split.labels[keep])
    return Split(resize(images, size), labels)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize a uint8 batch (N, 3, H, W) to (N, 3, size, size): bilinear, antialiased.

    Returns `images` itself where it has that size. The aspect ratio is not kept.
    """
    if tuple(images.shape[-2:]) == (size, size):
        return images
    resized = torch.empty(len(images), images.shape[1], size, size, dtype=torch.uint8)
    for start in range(0, len(images), RESIZE_CHUNK):  # Chunks keep the temporaries small.
        part = images[start : start + RESIZE_CHUNK]
        resized[start : start + RESIZE_CHUNK] = F.interpolate(
            part, (size, size), mode="bilinear", antialias=True
        )
    return resized
