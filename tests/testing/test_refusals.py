"""Which models the built-in defenses take. The conformance tests believe what a defense says; this table does not."""

from __future__ import annotations

import pytest

from backdoorbench_moe.testing.selection import REFERENCE_MODELS
from backdoorbench_moe.testing.test_defenses import refusal

ALL = {*REFERENCE_MODELS}
TAKEN = {
    "fine-pruning": ALL,
    "fine-tuning": ALL,
    "clp": ALL,
    "anp": ALL,
    "rnp": ALL,
    "bnp": {"pmoe", "wide_resnet"},
    "strip": ALL,
    "fst": ALL,
    "ft-sam": ALL,
    "nad": ALL,
    "i-bau": ALL,
    "scale-up": ALL,
    "ibd-psc": ALL,
    "routing-load": {"pmoe"},
    "neural-cleanse": ALL,
    "tile-tuning": ALL,
    "tile-distillation": ALL,
    "spectral": ALL,
    "activation-clustering": ALL,
    "scan": ALL,
    "abl": ALL,
    "expert-drop": {"pmoe"},
    "expert-reset": {"pmoe"},
    "reroute": {"pmoe"},
    "router-reset": {"pmoe"},
    "routing-strip": {"pmoe"},
}


@pytest.mark.parametrize("defense", TAKEN)
def test_a_defense_takes_the_models_that_have_what_it_works_on(defense: str) -> None:
    assert {model for model in ALL if refusal(defense, model) is None} == TAKEN[defense]
