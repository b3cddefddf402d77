"""Defenses that are compared with plain tuning augment images and smooth labels as the recipe says, as it does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defense_tasks import make_task, used_model
from torch.nn import functional as F

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.ops.images import as_input

OPTIONS = {
    "fine-tuning": {},
    "fst": {},
    "ft-sam": {},
    "nad": {},
    "tile-tuning": {},
    "neural-cleanse": {"unlearn_epochs": 1},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("fst", {"alpha": 0.0}), ("nad", {"betas": (0.0,)}), ("tile-tuning", {"share": 0.001})],
)
def test_the_labels_are_smoothed_as_the_recipe_says(name, options) -> None:
    """Without what each of them adds, the loss is that of plain tuning."""
    task, _ = make_task(used_model("wide_resnet"), name="wide_resnet", label_smoothing=0.3)
    found = []

    def tune(model, split, *, objective=None, **given) -> None:
        if objective is not None:
            images, labels = as_input(split.images), split.labels
            found.append(
                (
                    objective(model, images, labels)[1],
                    F.cross_entropy(model(images), labels, label_smoothing=0.3),
                )
            )

    create_defense(name, epochs=1, **options)(replace(task, tune=tune))
    [(loss, expected)] = found
    torch.testing.assert_close(loss, expected)


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
    monkeypatch.setattr("backdoorbench_moe.engine.training.tune.Trainer", Seen)
    create_defense(name, epochs=1, **OPTIONS[name])(task)
    assert seen and set(seen) == {"crop-flip"}
