"""The mix that gates are trained on: counts, order, no replacement, and what is shared between numbers of tasks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.splitters import create_splitter
from backdoorbench_moe.splitters.base import Splitter
from backdoorbench_moe.splitters.mix import mix

PLAIN_AND_NEGATIVE = create_splitter("domains", domains=("plain", "inverted"))


def numbered(count: int, classes: int = 4) -> Split:
    """Image i has the value i."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return Split(images, torch.arange(count) % classes)


def make(splitter: Splitter, split: Split, tasks: int, count: int | None = None, seed: int = 5) -> Split:
    return mix(splitter, split, tasks=tasks, images_per_task=count, num_classes=4, seed=seed)


def values(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 90), st.data())
def test_tasks_follow_each_other_and_no_image_comes_twice(count: int, data: st.DataObject) -> None:
    each = data.draw(st.integers(1, count))
    found = make(PLAIN_AND_NEGATIVE, numbered(count), 2, each, seed=data.draw(st.integers(0, 99)))
    plain, negative = values(found)[:each], [255 - value for value in values(found)[each:]]
    for chosen in (plain, negative):
        assert len(chosen) == each and chosen == sorted(set(chosen)) and chosen[-1] < count
    assert found.labels.tolist() == [value % 4 for value in plain + negative], "labels go with their images"


def test_by_default_every_task_has_its_part_of_the_training_set() -> None:
    found = make(PLAIN_AND_NEGATIVE, numbered(41), 2)
    assert len(found) == 2 * 20
    assert len(make(create_splitter("domains"), numbered(81), 8)) == 8 * 10
    assert len(make(create_splitter("domains"), numbered(5), 8)) == 8, "at least one of each"


def test_by_default_a_smaller_task_gives_all_it_has() -> None:
    split = Split(numbered(40).images, torch.tensor([0] * 30 + [1, 1, 2] + [3] * 7))
    found = make(create_splitter("classes", groups=4, order="numbered"), split, 4)
    assert found.labels.bincount().tolist() == [10, 2, 1, 7]
    assert values(found)[10:] == list(range(30, 40))


def test_a_task_does_not_depend_on_the_number_of_tasks() -> None:
    splitter, split = create_splitter("domains"), numbered(60)
    two, eight = make(splitter, split, 2, 9), make(splitter, split, 8, 9)
    assert torch.equal(two.images, eight.images[:18]) and torch.equal(two.labels, eight.labels[:18])


def test_tasks_have_draws_of_their_own_and_the_seed_decides() -> None:
    state, split = torch.get_rng_state(), numbered(60)
    found = make(PLAIN_AND_NEGATIVE, split, 2, 20)
    assert values(found)[:20] != [255 - value for value in values(found)[20:]]
    assert torch.equal(make(PLAIN_AND_NEGATIVE, split, 2, 20).images, found.images)
    assert not torch.equal(make(PLAIN_AND_NEGATIVE, split, 2, 20, seed=6).images, found.images)
    assert torch.equal(torch.get_rng_state(), state) and values(split) == list(range(60))


def test_the_provider_draws_from_all_images_whatever_the_makers_have() -> None:
    few = create_splitter("domains", domains=("plain", "inverted"), share=0.1)
    assert torch.equal(make(few, numbered(60), 2).images, make(PLAIN_AND_NEGATIVE, numbered(60), 2).images)


@pytest.mark.parametrize("count", [0, -1, 11])
def test_more_images_than_a_task_has(count: int) -> None:
    splitter = create_splitter("classes", groups=4, order="numbered")
    message = (
        rf"mixture\.gate_images: expected 1 to 10, the number of images of task 0 \(class 0\), got {count}"
    )
    with pytest.raises(ConfigError, match=message):
        make(splitter, numbered(40), 4, count)


def test_a_task_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"task: expected the number of a task in 0\.\.1, got 2"):
        make(PLAIN_AND_NEGATIVE, numbered(40), 3)
