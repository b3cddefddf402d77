"""Drawing pictures of traffic signs, one batch at a time.

Pictures are identical on every machine. Random bits are the raw output of PCG64. Pixels are computed by float32
additions, multiplications, divisions, square roots and comparisons only, whose results IEEE 754 defines
exactly. Library sines, sums over an axis and convolutions are avoided, since their last bits differ between machines.

Axis letters: B pictures, S side. The coordinates of a sign, (B, S, S), are in units of its radius; x points to the
right and y down. The *level* of a figure is a function of the coordinates that is negative inside the figure and
positive outside. Its slope is about 1 for each radius of distance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Level = Callable[[Array, Array], Array]
Colour = tuple[float, float, float]

DIAGONAL = 0.70710678  # 1 / sqrt(2)


class Draws:
    """Random numbers from a seed, the same with every version of numpy."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        """Return float32 numbers that are uniform in [low, high), from 24 random bits each."""
        raw = np.asarray(self._bits.random_raw(shape), np.uint64) >> np.uint64(40)
        return raw.astype(np.float32) * np.float32(2.0**-24) * np.float32(high - low) + np.float32(low)

    def triangular(self, *shape: int) -> Array:
        """Return noise with a triangular distribution, int16 in -255 to 255: differences of two random bytes."""
        count = int(np.prod(shape))
        raw = np.asarray(self._bits.random_raw((count + 3) // 4), "<u8").view(np.uint8)
        return (raw[0 : 2 * count : 2].astype(np.int16) - raw[1 : 2 * count : 2]).reshape(shape)

    def permutation(self, count: int) -> Array:
        """Return the numbers 0 to count - 1 in random order."""
        return np.argsort(np.asarray(self._bits.random_raw(count)), kind="stable")


# ---- figures -------------------------------------------------------------------------------------------
def box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    """Level of a box around the origin."""
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def disc(x: Array, y: Array) -> Array:
    """Level of the disc of radius 1."""
    return np.sqrt(x * x + y * y) - 1.0


def square(x: Array, y: Array) -> Array:
    """Level of an upright square."""
    return box(x, y, 0.88, 0.88)


def diamond(x: Array, y: Array) -> Array:
    """Level of a square on its corner."""
    return (np.abs(x) + np.abs(y)) * DIAGONAL - 0.8


def octagon(x: Array, y: Array) -> Array:
    """Level of an octagon with upright sides."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y), (x + y) * DIAGONAL) - 0.95


def triangle(x: Array, y: Array) -> Array:
    """Level of a triangle pointing up, with sides a little steeper than those of an equilateral one."""
    return np.maximum(y - 0.72, np.abs(x) * 0.88 - y * 0.475 - 0.5)


def bar(x: Array, y: Array) -> Array:
    """Level of a horizontal bar."""
    return box(x, y, 0.6, 0.17)


def plus(x: Array, y: Array) -> Array:
    """Level of an upright cross."""
    return np.minimum(box(x, y, 0.56, 0.16), box(x, y, 0.16, 0.56))


def cross(x: Array, y: Array) -> Array:
    """Level of a diagonal cross."""
    return plus((x + y) * DIAGONAL, (x - y) * DIAGONAL)


def small_cross(x: Array, y: Array) -> Array:
    """Level of a diagonal cross, low and small enough for a triangle."""
    return cross(x * 1.35, (y - 0.22) * 1.35) * 0.74


def exclamation(x: Array, y: Array) -> Array:
    """Level of an exclamation mark, low enough for a triangle."""
    return np.minimum(box(x, y - 0.02, 0.11, 0.33), box(x, y - 0.52, 0.11, 0.1))


def tee(x: Array, y: Array) -> Array:
    """Level of a T, the sign of a dead end."""
    return np.minimum(box(x, y + 0.34, 0.5, 0.17), box(x, y - 0.2, 0.15, 0.45))


def pause(x: Array, y: Array) -> Array:
    """Level of two vertical bars."""
    return box(np.abs(x) - 0.29, y, 0.14, 0.5)


def arrow_left(x: Array, y: Array) -> Array:
    """Level of an arrow to the left."""
    head = np.maximum(x + 0.02, (np.abs(y) - x - 0.64) * DIAGONAL)
    return np.minimum(head, box(x - 0.27, y, 0.33, 0.14))


def arrow_right(x: Array, y: Array) -> Array:
    """Level of an arrow to the right."""
    return arrow_left(-x, y)


def arrow_up(x: Array, y: Array) -> Array:
    """Level of an arrow up."""
    return arrow_left(y, x)


# ---- pictures ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Paint:
    """Colours of the rim, the face and the glyph of a sign, RGB in [0, 1]."""

    rim: Colour
    face: Colour
    glyph: Colour


@dataclass(frozen=True)
class Scene:
    """The random values of B pictures; the first axis of every field is B."""

    radius: Array
    centre: Array
    turn: Array
    stretch: Array
    softness: Array
    sky: Array
    ground: Array
    horizon: Array
    clutter: Array
    clutter_paint: Array
    fade: Array
    light: Array
    cast: Array
    haze: Array
    shadow: Array
    grain: Array
    noise: Array

    def __getitem__(self, rows: Array) -> Scene:
        return Scene(**{name: value[rows] for name, value in vars(self).items()})


def draw_scene(draws: Draws, count: int, side: int) -> Scene:
    """Draw the random values of `count` pictures."""

    def column(low: float, high: float) -> Array:
        return draws.uniform(low, high, count, 1, 1)

    def colour(first: Colour, second: Colour, third: Colour) -> Array:
        """A random mixture of three colours, made lighter or darker."""
        share, rest = column(0, 1)[..., None], column(0, 1)[..., None]
        one, two, three = (np.array(c, np.float32)[None, :, None, None] for c in (first, second, third))
        mixed = one + share * (two - one)
        return mixed + rest * (three - mixed) + draws.uniform(-0.1, 0.1, count, 3, 1, 1)

    radius = column(0.3, 0.44) * side
    return Scene(
        radius=radius,
        # Small signs may be anywhere; large ones may be cut a little at the edge.
        centre=draws.uniform(-1, 1, count, 2, 1, 1) * (0.5 * side - 0.85 * radius)[:, None],
        turn=column(-0.14, 0.14),
        stretch=column(0.85, 1.0),
        softness=column(0.9, 2.2),
        sky=colour((0.55, 0.75, 0.95), (0.9, 0.9, 0.88), (0.75, 0.6, 0.62)),
        ground=colour((0.22, 0.45, 0.16), (0.5, 0.38, 0.24), (0.36, 0.36, 0.38)),
        horizon=column(0.25, 1.0) * side,
        clutter=draws.uniform(-1, 1, count, 2, 7, 7),
        clutter_paint=colour((0.7, 0.22, 0.15), (0.15, 0.42, 0.14), (0.2, 0.32, 0.62)),
        fade=draws.uniform(-0.1, 0.1, count, 3, 1, 1),
        light=column(0.5, 1.05),
        cast=draws.uniform(0.9, 1.1, count, 3, 1, 1),
        haze=column(0.0, 0.25),
        shadow=draws.uniform(-1, 1, count, 4, 1, 1),
        grain=column(0.01, 0.06),
        noise=draws.triangular(count, 3, side, side),
    )


def draw_signs(scene: Scene, shape: Level, glyph: Level, paint: Paint, side: int) -> Array:
    """Draw one kind of sign into every scene: (B, 3, side, side) uint8."""
    x, y = _sign_coordinates(scene, side)
    outline = shape(x, y)
    picture = _background(scene, side)
    post = np.maximum(np.abs(x) - 0.09, -y)
    layers = (
        (post, (0.45, 0.46, 0.48)),
        (outline, paint.rim),
        (outline + 0.13, paint.face),
        (glyph(x, y), paint.glyph),
    )
    for level, colour in layers:
        cover = np.clip(0.5 - level * (scene.radius / scene.softness), 0.0, 1.0)[:, None]
        tint = np.array(colour, np.float32)[None, :, None, None] + scene.fade
        picture += cover * (tint - picture)
    return _expose(picture, scene, side)


def _grid(side: int) -> tuple[Array, Array]:
    """Return the pixel centres relative to the middle of the picture: y (1, S, 1) and x (1, 1, S)."""
    line = np.arange(side, dtype=np.float32) - (side - 1) / 2
    return line[None, :, None], line[None, None, :]


def _sign_coordinates(scene: Scene, side: int) -> tuple[Array, Array]:
    y, x = _grid(side)
    x, y = x - scene.centre[:, 0], y - scene.centre[:, 1]
    # A rotation without sine and cosine: by 2 atan(turn).
    square = scene.turn * scene.turn
    cosine, sine = (1.0 - square) / (1.0 + square), 2.0 * scene.turn / (1.0 + square)
    return (
        (x * cosine + y * sine) / (scene.radius * scene.stretch),
        (y * cosine - x * sine) / scene.radius,
    )


def _background(scene: Scene, side: int) -> Array:
    """Draw sky over ground, and clutter: spots of another colour, and of light and dark."""
    y, _ = _grid(side)
    spots, shades = _smooth(scene.clutter[:, 0], side), _smooth(scene.clutter[:, 1], side)
    below = np.clip((y + (side / 2) - scene.horizon + spots * 4.0) * 0.7, 0.0, 1.0)[:, None]
    picture = scene.sky + below * (scene.ground - scene.sky)
    cover = np.clip(spots * 2.5 - 0.5, 0.0, 0.9)[:, None]
    picture += cover * (scene.clutter_paint - picture)
    picture += (shades * 0.22)[:, None]
    return picture


def _smooth(knots: Array, side: int) -> Array:
    """Interpolate values (B, K, K) on a coarse grid smoothly to (B, side, side)."""
    last = knots.shape[-1] - 1
    place = np.arange(side, dtype=np.float32) * np.float32(last / side)
    left = np.floor(place).astype(np.int64)
    weight = place - left.astype(np.float32)
    weight = weight * weight * (3.0 - 2.0 * weight)
    rows = knots[:, left] + weight[None, :, None] * (knots[:, left + 1] - knots[:, left])
    return rows[:, :, left] + weight * (rows[:, :, left + 1] - rows[:, :, left])


def _expose(picture: Array, scene: Scene, side: int) -> Array:
    """Apply shadow, light, haze and noise, and convert to uint8."""
    y, x = _grid(side)
    along, across, offset, depth = (scene.shadow[:, part] for part in range(4))
    edge = (x * along + y * across) * 0.5 + offset * (side / 4)
    shade = 1.0 - np.clip(depth, 0.0, 0.5) * np.clip(edge + 0.5, 0.0, 1.0)
    picture *= (shade * scene.light * (1.0 - scene.haze))[:, None] * scene.cast
    picture += (scene.haze * 0.6)[:, None]
    picture *= 255.0
    picture += scene.noise * scene.grain[:, None]
    return np.clip(np.floor(picture + 0.5), 0.0, 255.0).astype(np.uint8)
