"""Every trigger changes plain images and plain tiles so that it survives rounding to 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.engine.poisoning.poison import stamp_images, stamp_places
from backdoorbench_moe.triggers import create_trigger

LEVELS = {"black": 0, "grey": 128, "white": 255}
TRIGGERS = ["sig", "frequency", "low-frequency", "colour", "reflection", "adaptive-blend", "patches"]


def plain(level: str) -> Tensor:
    return torch.full((8, 3, 32, 32), LEVELS[level], dtype=torch.uint8)


def stamps(name: str, where: str, seed: int) -> Stamper:
    options = {"patch_size": 4} if where == "patch" else {}
    return Stamper(create_trigger(name, seed=seed), create_applicator(where, **options))


def in_every_tile(changed: Tensor) -> bool:
    """Whether something changes in each 4x4 tile of each image."""
    return bool(changed.unfold(2, 4, 4).unfold(3, 4, 4).any(-1).any(-1).any(1).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", TRIGGERS)
def test_plain_images_and_plain_tiles_change(name: str, level: str) -> None:
    images, places = plain(level), torch.arange(8)
    for seed in range(4):
        for where in ("image", "patch"):
            stamper = stamps(name, where, seed)
            for stamped in (stamp_images(images, stamper), stamp_places(images, places, stamper.training)):
                changed = stamped != images
                assert changed.flatten(1).any(1).all()
                # A piece that is kept may be as grey as the tile.
                assert (
                    where == "image" or (name, level) == ("adaptive-blend", "grey") or in_every_tile(changed)
                )


@pytest.mark.parametrize(("level", "visible"), [("black", False), ("grey", True), ("white", False)])
def test_bpp_leaves_black_and_white(level: str, visible: bool) -> None:
    """They are levels already; its documentation says so."""
    images = plain(level)
    for where in ("image", "patch"):
        stamped = stamp_images(images, stamps("bpp", where, 0))
        assert bool((stamped != images).all()) == visible == bool((stamped != images).any())


@pytest.mark.parametrize("name", [*TRIGGERS, "bpp"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 9), (24, 40)])
def test_odd_canvases_stay_in_range(name: str, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    trigger = create_trigger(name, seed=1)
    forms = [trigger.training, *([trigger.noise] if trigger.has_noise else [])]
    for stamped in (trigger(images), *(form(images, torch.tensor([3, 8])) for form in forms)):
        assert stamped.isfinite().all() and stamped.min() >= 0 and stamped.max() <= 1
