"""Digests name run folders and committed results, so none of them may ever change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backdoorbench_moe.bench.suites.reading import list_scales, list_suites, load_suite
from backdoorbench_moe.config import spec_from_dict

PINNED = json.loads((Path(__file__).parent / "digests.json").read_text())


@pytest.mark.parametrize("pin", PINNED["specs"], ids=lambda pin: pin["name"])
def test_a_spec_keeps_its_digest_and_folder_name(pin) -> None:
    spec = spec_from_dict(pin["spec"])
    assert (spec.digest, spec.name) == (pin["digest"], pin["name"])


@pytest.mark.parametrize("pin", PINNED["specs"], ids=lambda pin: pin["name"])
def test_a_spec_is_written_as_it_was(pin) -> None:
    assert spec_from_dict(pin["spec"]).to_dict() == pin["written"]


@pytest.mark.parametrize("key", PINNED["suites"])
def test_a_suite_keeps_the_digest_of_its_runs(key) -> None:
    name, _, scale = key.partition(":")
    assert load_suite(name, scale or None).digest == PINNED["suites"][key]


def test_every_suite_is_pinned() -> None:
    keys = {f"{name}:{scale}" for name in list_suites() for scale in list_scales(name) or [""]}
    assert keys == set(PINNED["suites"])
