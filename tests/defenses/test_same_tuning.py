"""Defenses that are compared with plain tuning see the same images: augmented if the recipe says so."""

from __future__ import annotations

import pytest
from defense_tasks import make_task, used_model

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.engine.tune import Tuner

OPTIONS = {
    "fine-tuning": {},
    "fst": {},
    "ft-sam": {},
    "nad": {},
    "tile-tuning": {},
    "neural-cleanse": {"unlearn_epochs": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_all_images_are_augmented_as_the_recipe_says(name, monkeypatch) -> None:
    seen = []

    class Seen:
        """Stands for the trainer, and trains nothing."""

        optimizer = None

        def __init__(self, model, split, recipe: TrainSpec, **given) -> None:
            seen.append(recipe.augment)

        def fit(self, name: str):
            return type("Fitted", (), {"history": []})

    task, _ = make_task(used_model(), augment="crop-flip")
    assert isinstance(task.tune, Tuner)
    monkeypatch.setattr("backdoorbench_moe.engine.tune.Trainer", Seen)
    create_defense(name, epochs=1, **OPTIONS[name])(task)
    assert seen and set(seen) == {"crop-flip"}
