"""The default data set: images of traffic signs, drawn by this package. It needs no files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from backdoorbench_moe.data import sign_drawing as drawing
from backdoorbench_moe.data.base import Dataset, ImageSet, Split
from backdoorbench_moe.data.images import check_image_size, subset_and_resize

# Part of the seed; incremented whenever a pixel changes.
VERSION = 1
SIDE = 32
TRAIN_IMAGES, TEST_IMAGES = 6000, 2000
CHUNK = 100

WHITE, BLACK = (0.95, 0.95, 0.93), (0.1, 0.1, 0.1)
RED, BLUE, AMBER = (0.78, 0.12, 0.12), (0.1, 0.28, 0.68), (0.93, 0.68, 0.1)
RED_FACE = drawing.Paint(WHITE, RED, WHITE)
RED_RIM = drawing.Paint(RED, WHITE, BLACK)
BLUE_FACE = drawing.Paint(WHITE, BLUE, WHITE)
AMBER_FACE = drawing.Paint(BLACK, AMBER, BLACK)


@dataclass(frozen=True)
class Sign:
    """One class."""

    name: str
    shape: drawing.Level
    paint: drawing.Paint
    glyph: drawing.Level


# Classes share colours, shapes and glyphs, so none of these alone identifies a class.
SIGNS = (
    Sign("no entry", drawing.disc, RED_FACE, drawing.bar),
    Sign("road closed", drawing.disc, RED_FACE, drawing.cross),
    Sign("turn left", drawing.disc, BLUE_FACE, drawing.arrow_left),
    Sign("turn right", drawing.disc, BLUE_FACE, drawing.arrow_right),
    Sign("hospital", drawing.square, BLUE_FACE, drawing.plus),
    Sign("dead end", drawing.square, BLUE_FACE, drawing.tee),
    Sign("stop", drawing.octagon, RED_FACE, drawing.pause),
    Sign("crossroads", drawing.triangle, RED_RIM, drawing.small_cross),
    Sign("caution", drawing.triangle, AMBER_FACE, drawing.exclamation),
    Sign("ahead only", drawing.diamond, AMBER_FACE, drawing.arrow_up),
)


class Signs(Dataset):
    """Traffic signs drawn by this package: 10 classes, 6,000 training and 2,000 test images of 32x32 pixels.

    All classes have the same number of images. The images are identical on every machine. A class is defined by the
    shape, colour and glyph of the sign. Position, size, rotation, tilt, blur, background, fading, light, shadow, haze
    and noise are random.

    Args:
        image_size: Side of the images in pixels, 1 to 8192. Other sizes than 32 are resized (bilinear, antialiased).
        train_images: Number of training images to keep, from 1; all if None. See `Dataset`.
        test_images: Number of test images to keep, from 1; all if None. See `Dataset`.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self, *, image_size: int = SIDE, train_images: int | None = None, test_images: int | None = None
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.image_size = check_image_size(image_size)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the ten classes; nothing is drawn."""
        return tuple(sign.name for sign in SIGNS)

    def read(self) -> ImageSet:
        """Draw both splits, each from its own seed."""
        train, test = draw_split(0, TRAIN_IMAGES), draw_split(1, TEST_IMAGES)
        return ImageSet(
            "signs",
            subset_and_resize(train, self.train_images, "train_images", self.image_size),
            subset_and_resize(test, self.test_images, "test_images", self.image_size),
            self.class_names(),
        )


def draw_split(stream: int, count: int, *, side: int = SIDE) -> Split:
    """Draw the images of a split from the seed (VERSION, stream).

    Args:
        stream: 0 for the training images, 1 for the test images.
        count: Number of images, a multiple of the number of classes.
        side: Side of the images in pixels. Images are drawn in this size, not resized: in pixels, edges are as sharp
            and noise as fine as with 32.

    Returns:
        Images (count, 3, side, side) and their labels.
    """
    draws = drawing.Draws(VERSION, stream)
    order = draws.permutation(count)
    scene = drawing.draw_scene(draws, count, side)
    labels = order % len(SIGNS)
    images = np.empty((count, 3, side, side), np.uint8)

    def fill(rows: np.ndarray) -> None:
        sign = SIGNS[labels[rows[0]]]
        images[rows] = drawing.draw_signs(scene[rows], sign.shape, sign.glyph, sign.paint, side)

    kinds = (np.flatnonzero(labels == kind) for kind in range(len(SIGNS)))
    parts = [rows[start : start + CHUNK] for rows in kinds for start in range(0, len(rows), CHUNK)]
    # Small parts fit into the CPU cache. Threads are faster, since numpy releases the GIL while it computes.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, parts))
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
