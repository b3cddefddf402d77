"""Adaptive-Blend and Adaptive-Patch: what their training forms stamp, counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import create_trigger

PLACES = torch.arange(4000)


def grid(changed: Tensor, side: int) -> Tensor:
    """Whether all pixels of each of 4x4 pieces change, (B, 4, 4); none of them may change in part."""
    pieces = (
        changed.any(1).unflatten(1, (4, side // 4)).unflatten(3, (4, side // 4)).transpose(2, 3).flatten(3)
    )
    assert torch.equal(pieces.all(-1), pieces.any(-1))
    return pieces.all(-1)


@pytest.mark.parametrize("side", [4, 32])
def test_half_of_the_pieces_get_the_picture_with_the_training_ratio(side: int) -> None:
    images, places = torch.zeros(200, 3, side, side), PLACES[:200]
    trigger = create_trigger("adaptive-blend", seed=3)
    stamped = trigger.training(images, places)
    kept = grid(stamped > 0, side)
    assert (kept.flatten(1).sum(1) == 8).all()
    whole = create_trigger("blend", ratio=0.15)(images)
    inside = kept.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)[:, None].expand_as(images)
    torch.testing.assert_close(stamped[inside], whole[inside])
    assert torch.equal(trigger(images), create_trigger("blend", ratio=0.2)(images))


def test_each_piece_is_kept_in_half_of_the_images() -> None:
    """Of 4,000 images, within five standard deviations."""
    kept = create_trigger("adaptive-blend", seed=1).training(torch.zeros(4000, 3, 4, 4), PLACES).any(1)
    assert (kept.float().mean(0) - 0.5).abs().max() < 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize(("keep", "count"), [(0.01, 1), (0.25, 4), (1.0, 16)])
def test_the_share_of_kept_pieces(keep: float, count: int) -> None:
    stamped = create_trigger("adaptive-blend", keep=keep).training(torch.zeros(9, 3, 4, 4), PLACES[:9])
    assert (stamped.any(1).flatten(1).sum(1) == count).all()


# Rows and columns of an 8x8 image that each patch covers.
CORNERS = [(0, 0), (0, 6), (6, 6), (6, 0)]


def covered(patch: int) -> Tensor:
    mask, (row, column) = torch.zeros(8, 8, dtype=torch.bool), CORNERS[patch]
    mask[row : row + 2, column : column + 2] = True
    return mask


def test_each_training_image_gets_one_of_four_patches_with_its_opacity() -> None:
    """Of 4,000 images, each patch gets a quarter within five standard deviations."""
    white, black = torch.ones(4000, 3, 8, 8), torch.zeros(4000, 3, 8, 8)
    trigger = create_trigger("patches", seed=2)
    on_white, on_black = (trigger.training(images, PLACES) for images in (white, black))
    changed, counts = (on_white < 1).any(1) | (on_black > 0).any(1), []
    for patch, opacity in enumerate((0.5, 0.2, 0.5, 0.3)):
        chosen = (changed == covered(patch)).flatten(1).all(1)
        counts.append(int(chosen.sum()))
        # What is left of the difference of white and black is what shines through.
        through = (on_white - on_black)[chosen][..., covered(patch)]
        torch.testing.assert_close(through, torch.full_like(through, 1 - opacity))
    assert sum(counts) == 4000
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts)


@pytest.mark.parametrize("name", ["adaptive-blend", "patches"])
def test_another_seed_draws_other_pieces_and_patches(name: str) -> None:
    images, places = torch.zeros(40, 3, 8, 8), PLACES[:40]
    first, other = (create_trigger(name, seed=seed).training(images, places) for seed in (1, 2))
    assert not torch.equal(first, other)


def test_test_images_get_two_opaque_patches() -> None:
    for options, patches in (({}, (0, 2)), ({"test_patches": [1, 3]}, (1, 3))):
        trigger = create_trigger("patches", **options)
        white, black = (trigger(torch.full((1, 3, 8, 8), value))[0] for value in (1.0, 0.0))
        assert torch.equal((white == black).all(0), covered(patches[0]) | covered(patches[1]))


def test_patches_scale_with_the_canvas() -> None:
    for side in (4, 16, 64):
        changed = create_trigger("patches", test_patches=[0])(torch.ones(1, 3, side, side)).lt(1).any(1)[0]
        assert changed[: side // 4, : side // 4].all() and changed.sum() == (side // 4) ** 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adaptive-blend", {"ratio": 0}, "adaptive-blend: ratio: expected a number"),
        ("adaptive-blend", {"training_ratio": 2}, "adaptive-blend: training_ratio: expected a number"),
        ("adaptive-blend", {"keep": 0}, "adaptive-blend: keep: expected a number"),
        ("adaptive-blend", {"pieces": 0}, "adaptive-blend: pieces: expected an integer from 1"),
        ("adaptive-blend", {"pieces": 10**6}, "pieces: expected an integer from 1 to 256, got 1000000"),
        ("adaptive-blend", {"image": "missing.png"}, "adaptive-blend: image: expected a picture file"),
        ("patches", {"size": 0.6}, r"patches: size: expected a number in \(0, 0\.5\]"),
        ("patches", {"opacities": (1, 1, 0, 1)}, "patches: opacities: expected four numbers"),
        ("patches", {"test_patches": []}, "patches: test_patches: expected different numbers"),
        ("patches", {"test_patches": [0, 0]}, "patches: test_patches: expected different numbers"),
        ("patches", {"test_patches": [4]}, "patches: test_patches: expected different numbers"),
        ("patches", {"test_opacity": 0}, "patches: test_opacity: expected a number"),
    ],
)
def test_bad_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger(name, **options)
