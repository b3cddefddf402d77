"""Reading and resizing images, shared by the data sets."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from backdoorbench_moe.data.base import Split, draw_subset
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError, naming
from backdoorbench_moe.image_files import decode_content, read_content

# No model takes larger images.
MAX_SIDE = 8192
# A longer side after resizing would take gigabytes, most of which the crop discards.
LONGEST_SIDE = 4 * MAX_SIDE
RESIZE_CHUNK = 1024
# Files that a thread decodes at a time, and the maximum size of their images in bytes.
FILES_CHUNK, PART_BYTES = 64, 1 << 24
# Number of files from which decoding shows a progress bar.
SHOWN_FROM = 2000


@dataclass(frozen=True)
class Form:
    """How images are resized to squares of the same size (bilinear, antialiased).

    Attributes:
        size: Side of the square in pixels.
        crop: True to keep the aspect ratio: the shorter side is resized to `size`, and the image is center-cropped.
            False to resize both sides to `size`.
        resize: With `crop`, the size to which the shorter side is resized, at least `size`; `size` if None.
        convert: Whether CMYK images and images with transparent pixels are converted to RGB by Pillow instead of being
            refused.
    """

    size: int
    crop: bool
    resize: int | None = None
    convert: bool = False


def check_image_size(image_size: int) -> int:
    """Return `image_size` if it is in [1, `MAX_SIDE`].

    Raises:
        ConfigError: It is not.
    """
    if not 1 <= image_size <= MAX_SIDE:
        raise ConfigError.expected("dataset: image_size", f"1 to {MAX_SIDE} pixels", image_size)
    return image_size


def read_images(paths: Sequence[Path], form: Form) -> Tensor:
    """Decode image files in parallel.

    Of files with several frames only the first frame is read; a warning counts them.

    Args:
        paths: N files; see `image_files.decode` for the accepted images.
        form: How the images are resized.

    Returns:
        (N, 3, size, size) uint8.

    Raises:
        DataError: Files are missing, damaged or not accepted; the message names the first one and counts the others.
    """
    images = np.empty((len(paths), 3, form.size, form.size), np.uint8)

    def put(start: int, part: np.ndarray, _: Sequence[bytes]) -> None:
        images[start : start + len(part)] = part

    warn_of_frames(paths, decode_files(paths, form, put))
    return torch.from_numpy(images)


def decode_files(
    paths: Sequence[Path], form: Form, put: Callable[[int, np.ndarray, Sequence[bytes]], object]
) -> tuple[int, int]:
    """Decode image files in parallel.

    Args:
        paths: N files.
        form: How the images are resized.
        put: Called from several threads with the index of the first image of a part, its images (n, 3, size, size)
            uint8, and the contents of their n files.

    Returns:
        Number of files with several frames, and the index of the first of these.

    Raises:
        DataError: See `read_images`.
    """
    size = form.size
    faults: dict[int, DataError] = {}
    several: list[int] = []
    length = max(1, min(FILES_CHUNK, PART_BYTES // (3 * size * size)))

    def fill(start: int) -> None:
        part = paths[start : start + length]
        images, contents = np.zeros((len(part), 3, size, size), np.uint8), [b""] * len(part)
        for row, path in enumerate(part):
            try:
                contents[row] = read_content(path)
                image, more = decode_content(contents[row], path, convert=form.convert)
                with naming(str(path)):
                    images[row] = fitted_pixels(image, form)
            except DataError as error:
                faults[start + row] = error
                continue
            if more:
                several.append(start + row)
        put(start, images, contents)

    starts = range(0, len(paths), length)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(fill, starts)
        # Progress is shown in terminals only, and only for many files.
        hidden = len(paths) < SHOWN_FROM or not sys.stderr.isatty()
        console = Console(stderr=True)
        for _ in track(done, "decoding images", len(starts), console=console, transient=True, disable=hidden):
            pass
    if faults:
        others = f"; {len(faults) - 1} more of {len(paths)} files are refused, too" if len(faults) > 1 else ""
        raise DataError(f"{faults[min(faults)]}{others}") from faults[min(faults)]
    return len(several), min(several, default=0)


def fitted_pixels(image: Image.Image, form: Form) -> np.ndarray:
    """Resize an RGB image and return its pixels (3, size, size) uint8."""
    if form.crop and form.resize not in (None, form.size):
        assert form.resize is not None
        image = resize_and_crop(image, form.resize, form.size)
    elif image.size != (form.size, form.size):
        fit = ImageOps.fit if form.crop else Image.Image.resize
        image = fit(image, (form.size, form.size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def resize_and_crop(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Resize the shorter side to `resize` pixels and center-crop, as torchvision's Resize and CenterCrop do."""
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    if max(width, height) > LONGEST_SIDE:
        raise DataError(
            f"expected an image whose longer side is at most {LONGEST_SIDE} pixels when the shorter one is {resize}, "
            f"got one of {image.size[0]}x{image.size[1]}"
        )
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def warn_of_frames(paths: Sequence[Path], frames: Sequence[int]) -> None:
    """Warn if files have several frames.

    Args:
        paths: All files.
        frames: Number of files with several frames, and the index of the first of these.
    """
    count, first = frames
    if count:
        what = "file has" if count == 1 else "files have"
        warnings.warn(
            f"{count} {what} several frames or pages, such as {paths[first]}; only the first of each is read",
            BbmoeWarning,
            stacklevel=3,
        )


def subset_and_resize(split: Split, count: int | None, name: str, size: int) -> Split:
    """Keep some images of a split, see `draw_subset`, and resize them.

    The images are drawn first, because all of them might not fit into memory in the new size.

    Args:
        split: The complete split.
        count: Number of images to keep; all if None.
        name: "train_images" or "test_images".
        size: Side of the resized images in pixels.

    Returns:
        The resized images with their labels. They share memory with `split` if nothing changes.

    Raises:
        ConfigError: There are fewer than `count` images.
    """
    keep = draw_subset(len(split), count, name)
    whole = len(keep) == len(split)
    images, labels = (split.images, split.labels) if whole else (split.images[keep], split.labels[keep])
    return Split(resize(images, size), labels)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images (bilinear, antialiased); the aspect ratio is not kept.

    Args:
        images: (N, 3, H, W) uint8.
        size: Side of the resized images in pixels.

    Returns:
        (N, 3, size, size) uint8; `images` itself if it has this size.
    """
    if tuple(images.shape[-2:]) == (size, size):
        return images
    resized = torch.empty(len(images), images.shape[1], size, size, dtype=torch.uint8)
    for start in range(0, len(images), RESIZE_CHUNK):  # Chunks keep the temporaries small.
        part = images[start : start + RESIZE_CHUNK]
        # torch's uint8 kernel fails with an internal error for an output of one pixel.
        given = part.float() if size == 1 else part
        made = F.interpolate(given, (size, size), mode="bilinear", antialias=True)
        resized[start : start + RESIZE_CHUNK] = made.round() if size == 1 else made
    return resized
