"""BadPatches: every tile is stamped as an image of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.ops.patches import tile
from backdoorbench_moe.triggers import create_trigger
from backdoorbench_moe.triggers.square import Square

OPTIONS = [("square", {"size": 1}), ("blend", {}), ("warp", {}), ("warp", {"sampling": "truncate"})]


def test_a_square_in_every_tile_by_hand() -> None:
    stamped = create_applicator("patch", patch_size=3)(torch.ones(1, 1, 6, 6), Square(size=1))
    expected = torch.ones(6, 6)
    expected[::3, ::3] = 0
    assert torch.equal(stamped[0, 0], expected)


def test_the_default_tile_is_4x4() -> None:
    stamped = create_applicator("patch")(torch.ones(1, 3, 32, 32), Square(size=1))
    assert (stamped == 0).sum() == 3 * 64


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(trigger=st.sampled_from(OPTIONS), size=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99))
def test_each_tile_gets_the_trigger_of_its_size(trigger: tuple, size: int, seed: int) -> None:
    name, options = trigger
    stamp = create_trigger(name, seed=seed, **options)
    images = torch.rand(2, 3, 8, 16)
    stamped = create_applicator("patch", patch_size=size)(images, stamp)
    for before, after in zip(tile(images, size), tile(stamped, size), strict=True):
        torch.testing.assert_close(after, stamp(before[None])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("trigger", OPTIONS)
def test_one_tile_is_the_image_applicator(trigger: tuple) -> None:
    name, options = trigger
    images, stamp = torch.rand(3, 3, 16, 16), create_trigger(name, **options)
    whole = create_applicator("image")(images, stamp)
    assert torch.equal(create_applicator("patch", patch_size=16)(images, stamp), whole)
    assert not torch.equal(create_applicator("patch", patch_size=8)(images, stamp), whole)


def test_the_image_applicator_hands_the_image_over() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(create_applicator("image")(images, lambda x: 1 - x), 1 - images)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_bad_patch_sizes(size: object) -> None:
    with pytest.raises(ConfigError, match="patch_size"):
        create_applicator("patch", patch_size=size)


def test_a_patch_size_that_does_not_tile() -> None:
    with pytest.raises(ShapeError, match=r"patch_size.*\(1, 2, 4, 8, 16, 32\), got 5"):
        create_applicator("patch", patch_size=5)(torch.rand(1, 3, 32, 32), Square(size=1))


def test_a_trigger_too_large_for_the_tile() -> None:
    with pytest.raises(ShapeError, match=r"size 5 .* got 4x4"):
        create_applicator("patch", patch_size=4)(torch.rand(1, 3, 32, 32), Square(size=5))
