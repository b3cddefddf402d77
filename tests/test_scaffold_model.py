"""The model that `bbmoe plugin new --kind model` writes: everything that works on experts works on it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

import backdoorbench_moe as bbmoe
from backdoorbench_moe import models
from backdoorbench_moe.moe.structure import Structured, WithExperts
from backdoorbench_moe.scaffold import plan_package, render_package

OPTIONS = {
    "expert-drop": {"clean_fraction": 0.5},
    "expert-reset": {"clean_fraction": 0.5, "epochs": 1},
    "fine-pruning": {"clean_fraction": 0.5, "epochs": 1, "ratio": 0.2},
    "fine-tuning": {"clean_fraction": 0.5, "epochs": 1, "scope": "experts"},
    "router-reset": {"clean_fraction": 0.5, "epochs": 1},
    "reroute": {"clean_fraction": 0.5},
    "routing-strip": {"clean_fraction": 0.5},
}


@pytest.fixture
def model() -> Iterator[str]:
    """Its name, registered in this process."""
    files = dict(render_package(plan_package("bbmoe-written", ["model"])))
    module = ModuleType("written")
    exec(compile(files["bbmoe_written/model.py"], "model.py", "exec"), module.__dict__)
    models.registry.register("written")(module.WrittenModel)
    yield "written"
    models.registry.unregister("written")


@pytest.mark.slow
def test_the_written_model_is_attacked_defended_and_analyzed(model, tmp_path) -> None:
    built = bbmoe.create_model(model)
    assert isinstance(built, WithExperts) and isinstance(built, Structured)
    [run] = bbmoe.attack(
        model={"name": model, "width": 16, "hidden": 8, "num_experts": 3},
        dataset="tiny",
        trigger="square",
        poison={"rate": 0.25},
        train={"epochs": 1, "batch_size": 32},
        output=tmp_path,
        twin=False,
    )
    for defense, options in OPTIONS.items():
        defended = bbmoe.defend(run, defense, **options)
        assert defended.record.status == "finished" and defended.record.metrics["ba"]["n"] > 0, defense
    analysis = bbmoe.analyze(run, carriers_images=10)
    assert analysis.carriers is not None and len(analysis.carriers.singles) == 3
