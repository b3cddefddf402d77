"""The table of published attacks: each command makes what its row says."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from backdoorbench_moe.cli.attack import command, spec_from_flags
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.setups.images import ImageSetup

PAGE = (Path(__file__).parents[1] / "docs/pages/attacks.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| ([^|]+) \| `(bbmoe attack [^`]+)` \|$", PAGE, re.MULTILINE))
# Of the 6,000 training images of signs: poison, cover, noise.
GROUPS = {
    "SIG": (300, 0, 0),
    "WaNet": (600, 0, 1200),
    "BPP": (600, 0, 600),
    "BPP, the paper's": (1200, 0, 1200),
    "CTRL": (300, 0, 0),
    "Refool": (300, 0, 0),
    "Adaptive-Blend": (18, 18, 0),
    "Adaptive-Patch": (18, 36, 0),
    "TaCT": (18, 18, 0),
    "BadPatches": (120, 0, 0),
    "Narcissus": (30, 0, 0),
    "label-consistent": (300, 0, 0),
    "pattern that captures experts": (60, 0, 0),
    # Poisoned batch by batch.
    "WaNet, the attacker trains": (0, 0, 0),
    "input-aware": (0, 0, 0),
}


@pytest.fixture(scope="module")
def signs() -> ImageSet:
    return create_dataset("signs").load()


def spec_of(line: str) -> RunSpec:
    """The spec that a command makes."""
    given = command.make_context("attack", shlex.split(line)[2:]).params
    return spec_from_flags(given.pop("config"), given.pop("settings"), given)


def test_the_table_is_read_whole_and_has_every_trigger() -> None:
    assert len(COMMANDS) == PAGE.count("`bbmoe attack")
    assert GROUPS.keys() < COMMANDS.keys()
    points = entry_points(group="backdoorbench_moe.triggers")
    ours = {
        point.name for point in points if point.dist is not None and point.dist.name == "backdoorbench-moe"
    }
    # Its images are those of another tool.
    assert {spec_of(line).trigger.name for line in COMMANDS.values()} == ours - {"stored"}


@pytest.mark.parametrize("attack", COMMANDS)
def test_an_attack_is_built_and_its_groups_drawn(attack: str, signs: ImageSet) -> None:
    """As `--dry-run` does before it estimates the time."""
    spec = spec_of(COMMANDS[attack])
    setup = ImageSetup(spec, signs)
    plan, labels = setup.plan, signs.train.labels
    assert plan is not None
    assert tuple(map(len, plan.groups.values())) == GROUPS.get(attack, (600, 0, 0))
    true = labels[plan.indices]
    if spec.poison.labels == "clean":
        assert (true == 0).all() and (plan.labels == 0).all()
    elif spec.poison.mapping == "all-to-all":
        assert (plan.labels == (true + 1) % 10).all()
    else:
        assert (plan.labels == 0).all() and (attack == "TaCT" or not len(true) or len(true.unique()) > 5)
    if attack == "TaCT":
        assert (true == 1).all() and (labels[plan.cover] != 1).all()
    assert setup.stamper is not None
    assert setup.stamper.applicator.__class__.__name__.startswith("Patch") == (attack == "BadPatches")
