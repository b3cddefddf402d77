"""The square: its pixels, and the canvases it does not fit into."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.triggers import create_trigger
from backdoorbench_moe.triggers.square import Square


def test_the_default_is_the_papers() -> None:
    images = torch.rand(2, 3, 32, 32) * 0.9 + 0.1
    expected = images.clone()
    expected[:, :, :4, :4] = 0
    assert torch.equal(Square()(images), expected)


@pytest.mark.parametrize(
    ("position", "row", "column"),
    [
        ("upper-left", 0, 0),
        ("upper-right", 0, 5),
        ("lower-left", 3, 0),
        ("lower-right", 3, 5),
        ("centre", 1, 2),
        ((2, 4), 2, 4),
        ([3, 5], 3, 5),
    ],
)
def test_positions_on_a_wide_canvas(position: object, row: int, column: int) -> None:
    stamped = create_trigger("square", size=2, position=position)(torch.ones(1, 1, 5, 7))
    black = {(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)}
    assert {tuple(where) for where in (stamped[0, 0] == 0).nonzero().tolist()} == black


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ("white", (1, 1, 1)),
        ("#ff8000", (1, 128 / 255, 0)),
        ((0.25, 0.5, 1), (0.25, 0.5, 1)),
        ([0, 0, 1], (0, 0, 1)),
    ],
)
def test_colours(colour: object, expected: tuple[float, ...]) -> None:
    stamped = create_trigger("square", size=1, colour=colour)(torch.full((1, 3, 2, 2), 0.3))
    assert stamped[0, :, 0, 0].tolist() == pytest.approx(expected)
    assert stamped[0, :, 1, 1].tolist() == pytest.approx([0.3] * 3)


def test_a_grey_square_fits_any_number_of_channels() -> None:
    assert Square(size=1, colour=(0.5, 0.5, 0.5))(torch.ones(1, 5, 2, 2))[0, :, 0, 0].tolist() == [0.5] * 5
    with pytest.raises(ShapeError, match="3 channels"):
        Square(size=1, colour="red")(torch.ones(1, 1, 2, 2))


def test_a_square_may_fill_the_canvas_but_not_exceed_it() -> None:
    assert Square(size=4)(torch.ones(1, 3, 4, 4)).sum() == 0
    with pytest.raises(ShapeError, match=r"size 5 .* got 4x8"):
        Square(size=5, position="centre")(torch.ones(1, 3, 4, 8))
    with pytest.raises(ShapeError, match=r"size 2 at \(0, 7\) .* got 8x8"):
        Square(size=2, position=(0, 7))(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: expected a positive"),
        ({"colour": "blak"}, "colour: expected a colour name.*'blak'"),
        ({"colour": "rgb(300, 0, 0)"}, r"colour: expected red, green and blue in \[0, 1\]"),
        ({"colour": (0, 0, 2)}, r"colour: expected red, green and blue in \[0, 1\]"),
        ({"colour": (0, 0, float("nan"))}, "colour: expected"),
        ({"position": "uper-left"}, "position: unknown.*did you mean 'upper-left'"),
        ({"position": (-1, 0)}, "position: expected"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    for make in (Square, lambda **given: create_trigger("square", **given)):
        with pytest.raises(ConfigError, match=message):
            make(**options)


def test_gradients_stop_at_the_square() -> None:
    images = torch.rand(1, 3, 6, 6, requires_grad=True)
    Square(size=2)(images).sum().backward()
    expected = torch.ones(1, 3, 6, 6)
    expected[:, :, :2, :2] = 0
    assert torch.equal(images.grad, expected)


def test_the_noise_form_is_a_square_of_random_colours_at_the_same_place() -> None:
    images, places = torch.rand(3, 3, 8, 6), torch.tensor([7, 0, 7])
    trigger = Square(size=2, position=(1, 3), seed=4)
    stamped = trigger.noise(images, places)
    changed = torch.zeros(8, 6, dtype=torch.bool)
    changed[1:3, 3:5] = True
    assert torch.equal(stamped[:, :, ~changed], images[:, :, ~changed])
    square = stamped[:, :, 1:3, 3:5]
    assert torch.equal(square[0], square[2]) and not torch.equal(square[0], square[1])
    assert len(square[:2].unique()) == 2 * 3 * 2 * 2  # Every pixel and channel has a colour of its own.
    assert not torch.equal(Square(size=2, position=(1, 3), seed=5).noise(images, places), stamped)


def test_in_tiles_an_image_has_one_noise_stamp() -> None:
    stamper = Stamper(Square(size=2), create_applicator("patch", patch_size=4))
    stamped = stamper.noise(torch.ones(2, 3, 8, 12), torch.tensor([3, 5]))
    tiles = stamped.unfold(2, 4, 4).unfold(3, 4, 4)  # (image, channel, row of tiles, column of tiles, 4, 4)
    squares = tiles[..., :2, :2]
    assert torch.equal(squares, squares[:, :, :1, :1].expand_as(squares))
    assert not torch.equal(squares[0], squares[1]) and (squares < 1).all()
