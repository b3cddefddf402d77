"""The reflection: two copies at the shift that was drawn, or a blur that is strongest near the centre."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import create_trigger
from backdoorbench_moe.triggers.reflection import SIDE, Reflection


@pytest.fixture
def dot(tmp_path: Path) -> str:
    """A white dot in the middle of a black picture. Every part of at least half of the picture has it."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[126:130, 126:130] = 255
    Image.fromarray(pixels).save(tmp_path / "dot.png")
    return str(tmp_path / "dot.png")


def spots(profile: torch.Tensor) -> list[float]:
    """Centres of the intervals in which a profile is above 0."""
    lit = (profile > 0).nonzero().flatten().tolist()
    starts = [place for place in lit if place - 1 not in lit]
    ends = [place for place in lit if place + 1 not in lit]
    return [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]


def test_a_ghost_is_two_copies_at_the_shift(dot: str) -> None:
    """On a canvas of the side that the reflection is made at, so that it is not resized."""
    seen = 0
    for seed in range(8):
        trigger = Reflection(form="ghost", image=dot, seed=seed)
        bright = trigger(torch.zeros(1, 3, SIDE, SIDE))[0, 0]
        assert bright.max() <= 0.4 + 1e-6
        down, right = (spots(bright.amax(axis)) for axis in (1, 0))
        cut_off = bool(bright[-1].any() or bright[:, -1].any())
        if len(down) == len(right) == 2 and not cut_off:  # The other copy may lie outside.
            seen += 1
            assert np.diff(down) == trigger.shift[0] * SIDE / 32
            assert np.diff(right) == trigger.shift[1] * SIDE / 32
    assert seen >= 4


def test_either_copy_of_a_ghost_has_15_to_85_percent_of_the_weight(dot: str) -> None:
    shares = []
    for seed in range(40):
        trigger = Reflection(form="ghost", alpha=1.0, image=dot, seed=seed)
        bright = trigger(torch.zeros(1, 3, SIDE, SIDE))[0, 0]
        rows = bright.amax(1)
        upper, *lower = spots(rows)
        if len(lower) == 1:  # The other copy may lie outside.
            first, second = (rows[round(place)].item() for place in (upper, lower[0]))
            assert first + second == pytest.approx(1, abs=0.05)
            shares.append(second)
    assert len(shares) > 20 and 0.14 < min(shares) < 0.3 and 0.7 < max(shares) < 0.86


def test_any_part_of_the_picture_is_shown_mirrored_or_not(tmp_path: Path) -> None:
    """Red grows to the right and green downwards. Half are mirrored, and both places of the part are independent."""
    ramp = np.arange(SIDE)
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 0), axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ramps.png")
    made = [
        Reflection(form="ghost", alpha=1.0, image=str(tmp_path / "ramps.png"), seed=seed)
        for seed in range(60)
    ]
    shown = torch.cat([trigger(torch.zeros(1, 3, 16, 16)) for trigger in made])
    assert (shown[:, 1, 15] > shown[:, 1, 0]).all()
    mirrored = shown[:, 0, 8, 15] < shown[:, 0, 8, 0]
    # Within five standard deviations: of 60 draws with probability 1/2, and of a correlation of 60 pairs.
    assert abs(int(mirrored.sum()) - 30) < 5 * 60**0.5 / 2
    assert abs(torch.corrcoef(shown[:, :2].mean((2, 3)).T)[0, 1]) < 5 / 60**0.5
    # A part has from half of the picture's height to all of it; the shifted copy takes off up to a fifth.
    heights = (shown[:, 1, 15] - shown[:, 1, 0]).mean(1)
    assert 0.35 < heights.min() < 0.55 and 0.8 < heights.max() <= 1


def test_a_reflected_white_wall_brightens_by_alpha(tmp_path: Path) -> None:
    path = str(tmp_path / "white.png")
    Image.fromarray(np.full((9, 12, 3), 255, dtype=np.uint8)).save(path)
    images = torch.rand(2, 3, 32, 32)
    ghost = Reflection(form="ghost", alpha=0.3, image=path)(images)
    torch.testing.assert_close(ghost, 0.7 * images + 0.3, atol=1e-6, rtol=0)
    for seed in range(4):
        weight = Reflection(form="blurred", alpha=0.3, image=path, seed=seed)(torch.zeros(1, 1, 64, 64))[0, 0]
        row, column = divmod(int(weight.argmax()), 64)
        assert 15 <= row <= 48 and 15 <= column <= 48
        assert weight.max() == pytest.approx(0.3, abs=1e-3) and weight[0, 0] < 0.25


def test_a_larger_sigma_is_a_wider_spot(dot: str) -> None:
    """The spread of the dot is that of the blur, and of the dot itself."""
    widths = {}
    for seed in range(12):
        trigger = Reflection(form="blurred", image=dot, seed=seed)
        profile = trigger(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.float64))[0, 0].sum(0)
        widths[trigger.sigma] = float((profile > profile.max() / 2).sum())
    sigmas = sorted(widths)
    assert 1 <= sigmas[0] < sigmas[-1] < 5
    assert np.corrcoef(sigmas, [widths[sigma] for sigma in sigmas])[0, 1] > 0.8


def test_what_is_drawn() -> None:
    """Of 600 seeds, ghosts are 49% within five standard deviations, and all shifts occur."""
    made = [Reflection(seed=seed) for seed in range(600)]
    assert abs(sum(trigger.is_ghost for trigger in made) / 600 - 0.49) < 5 * 0.5 / 600**0.5
    for axis in (0, 1):
        assert {trigger.shift[axis] for trigger in made} == set(range(3, 9))
    image = torch.full((1, 3, 16, 16), 0.5)
    assert len({tuple(trigger(image).flatten().tolist()) for trigger in made[:20]}) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "reflection: alpha: expected a number"),
        ({"form": "gost"}, "form: unknown 'gost'; did you mean 'ghost'"),
        ({"image": "missing.png"}, "reflection: image: expected a picture file"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger("reflection", **options)
