"""The embedded default data set: pictures like traffic signs, drawn by this module, the same on every machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from backdoorbench_moe.data import sign_drawing as drawing
from backdoorbench_moe.data.base import Dataset, ImageSet, Split
from backdoorbench_moe.data.images import check_image_size, subset_and_resize

# Part of the seed; raised by one whenever a pixel changes.
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


# Classes share colours, shapes and glyphs, so that none of these alone tells a class.
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
    """Ten kinds of signs: 6,000 training and 2,000 test images of 32x32, equally many of each kind.

    Shape, colour and glyph make a kind; place, size, rotation, tilt, blur, background, fading, light, shadow, haze and
    noise vary.

    Args:
        image_size: Side in pixels to resize to (bilinear, antialiased); 32 keeps the images as they are drawn.
        train_images: Keep this many training images, as in `Dataset`.
        test_images: Keep this many test images, as in `Dataset`.
    """

    def __init__(
        self, *, image_size: int = SIDE, train_images: int | None = None, test_images: int | None = None
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.image_size = check_image_size(image_size)

    def class_names(self) -> tuple[str, ...]:
        """Return the ten names; draws nothing."""
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
    """Draw pictures from the seed (VERSION, stream).

    Args:
        stream: 0 for the training images, 1 for the test images.
        count: Number of pictures, a multiple of the number of kinds.
        side: In pixels. Larger pictures are drawn at that size, not resized: their edges are as sharp, and their
            noise as fine, as at 32x32.
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
    # Small parts stay in the cache. Threads help, since numpy releases the interpreter lock while it computes.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, parts))
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
