"""The colour filter: worked by hand."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.triggers import create_trigger


def filtered(pixel: tuple[float, float, float], **options: object) -> list[float]:
    image = torch.tensor(pixel, dtype=torch.float64).view(1, 3, 1, 1)
    return create_trigger("colour", **options)(image).flatten().tolist()


PLAIN = {"gain": (1, 1, 1), "offset": (0, 0, 0)}


@pytest.mark.parametrize(
    ("pixel", "options", "expected"),
    [
        ((0, 0, 0), {}, (0.1, 0, 0)),
        ((1, 1, 1), {}, (1, 0.95, 0.85)),
        ((0.5, 0.5, 0.5), {}, (0.55, 0.475, 0.425)),
        ((0.5, 0.4, 0.2), {**PLAIN, "gamma": (2, 1, 0.5)}, (0.25, 0.4, 0.2**0.5)),
        # Red and blue change places, and green becomes their difference, which is clipped at 0 before the offset.
        (
            (0.2, 0.5, 0.6),
            {**PLAIN, "offset": (0, 0.3, 0), "matrix": (0, 0, 1, 1, 0, -1, 1, 0, 0)},
            (0.6, 0.3, 0.2),
        ),
        ((0.2, 0.5, 0.6), {"gain": (3, 3, 3), "offset": (-1, 0, 1)}, (0, 1, 1)),
    ],
)
def test_by_hand(pixel, options, expected) -> None:
    assert filtered(pixel, **options) == pytest.approx(expected)


def test_the_gradient_at_black_is_finite() -> None:
    images = torch.zeros(1, 3, 2, 2, requires_grad=True)
    create_trigger("colour", gamma=(0.5, 0.5, 0.5))(images).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": (1, 1, -1)}, "colour: gain: expected three numbers of at least 0"),
        ({"offset": (0, 0, 2)}, r"colour: offset: expected three numbers in \[-1, 1\]"),
        ({"gamma": (1, 0, 1)}, "colour: gamma: expected a positive number, got 0"),
        ({"matrix": (1, 0, 0)}, "colour: matrix: expected nine numbers"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger("colour", **options)


def test_other_numbers_of_channels() -> None:
    with pytest.raises(ShapeError, match="colour: expected images of 3 channels, got 1"):
        create_trigger("colour")(torch.rand(1, 1, 4, 4))
