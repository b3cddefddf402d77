"""Defenses that take long outside of tuning say how far they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planted_channel import planted_task

from backdoorbench_moe.defenses import create_defense


@pytest.mark.parametrize(
    ("name", "options", "total"),
    [
        ("anp", {"steps": 3, "batch_size": 12}, 3),
        ("i-bau", {"rounds": 2}, 2),
        # Two epochs of unlearning and two of recovery: 90 images are 7 batches of 12 and one of 6.
        ("rnp", {"epochs": 2, "batch_size": 12, "unlearn_to": 0.0}, 32),
        # Three epochs for each of the classes, one after the other.
        ("neural-cleanse", {"epochs": 3, "classes_at_once": 1, "unlearn_epochs": 1}, None),
    ],
)
def test_the_steps_are_counted_up_to_the_last(name, options, total) -> None:
    task = planted_task()
    seen: list[tuple[int, int]] = []
    task = replace(task, progress=lambda done, all_steps: seen.append((done, all_steps)))
    create_defense(name, **options)(task)
    last = total or 3 * task.num_classes
    assert {all_steps for _, all_steps in seen} == {last}
    assert seen == sorted(seen) and seen[-1] == (last, last)
