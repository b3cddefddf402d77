"""The conformance tests pass for a right splitter and for the documented one; each fails for one that is wrong."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backdoorbench_moe import splitters
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.splitters.base import Splitter
from backdoorbench_moe.testing import test_splitters
from backdoorbench_moe.testing.test_splitters import SEED, Tasks

NAME = "under-test"


class Right(Splitter):
    """Two levels of brightness."""

    def names(self, num_classes: int, seed: int) -> tuple[str, ...]:
        return ("bright", "dim")

    def transform(self, images: Tensor, task: int) -> Tensor:
        return images / (task + 1)


class SameName(Right):
    def names(self, num_classes: int, seed: int) -> tuple[str, ...]:
        return ("bright", "bright")


class TakesAnyNumber(Right):
    def check(self, num_experts: int, num_classes: int, seed: int) -> None:
        pass


class DrawsMembersFromTorch(Right):
    def members(self, labels: Tensor, task: int, **given: object) -> Tensor:
        return torch.randperm(len(labels))[: len(labels) // 2].sort().values


class DrawsOnceFromTorch(Right):
    """A use of torch's generator that no image shows."""

    def transform(self, images: Tensor, task: int) -> Tensor:
        torch.rand(())
        return super().transform(images, task)


class WritesToTheFloats(Right):
    def transform(self, images: Tensor, task: int) -> Tensor:
        return images.div_(task + 1)


class MixesImages(Right):
    def transform(self, images: Tensor, task: int) -> Tensor:
        return (images - images.mean(0) / 2).clamp(0, 1) / (task + 1)


class KnowsThePlace(Right):
    def transform(self, images: Tensor, task: int) -> Tensor:
        return images / (task + 1 + torch.arange(len(images)).view(-1, 1, 1, 1))


class OneTaskTwice(Right):
    def transform(self, images: Tensor, task: int) -> Tensor:
        return images / 2


class HasAMemory(Right):
    def __init__(self) -> None:
        self.calls = 0

    def transform(self, images: Tensor, task: int) -> Tensor:
        self.calls += 1
        return images / (task + self.calls)


class TakesTheDefaultType(Right):
    def transform(self, images: Tensor, task: int) -> Tensor:
        return images * torch.full((1,), 1 / (task + 1))


class ReadsMemoryInOrder(Right):
    def transform(self, images: Tensor, task: int) -> Tensor:
        height, width = images.shape[-2:]
        return images.as_strided(images.shape, (3 * height * width, height * width, width, 1)) / (task + 1)


class AlwaysHasTheFirst(Right):
    def members(self, labels: Tensor, task: int, **given: object) -> Tensor:
        return torch.arange(max(1, len(labels)))


WRONG = [
    (SameName, "there_are_tasks_of_different_names"),
    (TakesAnyNumber, "more_experts_than_tasks_are_refused"),
    (DrawsMembersFromTorch, "images_and_labels_of_the_members"),
    (DrawsMembersFromTorch, "the_same_seed_gives_the_same_images"),
    (DrawsOnceFromTorch, "nothing_else_is_written_to"),
    (WritesToTheFloats, "the_floats_are_not_written_to"),
    (MixesImages, "images_do_not_mix"),
    (KnowsThePlace, "images_do_not_mix"),
    (OneTaskTwice, "tasks_differ"),
    (HasAMemory, "a_task_does_not_depend_on_what_was_asked_before"),
    (TakesTheDefaultType, "global_settings_of_torch_do_not_matter"),
    (ReadsMemoryInOrder, "memory_layout_does_not_matter"),
    (AlwaysHasTheFirst, "no_images_are_refused"),
]
# What the base class and the registry refuse, whatever a subclass does.
REFUSALS = {
    *("tasks_that_are_not_there_are_refused", "invalid_splits_are_refused"),
    *("unknown_options_are_refused_by_name", "a_gpu_gives_what_the_cpu_gives"),
}


def run(kind: type[Splitter], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one conformance test."""
    test = getattr(test_splitters, f"test_{name}")
    given = {"splitter_name": NAME, "training": True, "monkeypatch": monkeypatch}
    given["tasks"] = Tasks(kind(), 7, 48)
    test(**{key: given[key] for key in inspect.signature(test).parameters})


@pytest.fixture
def register() -> Iterator[object]:
    yield splitters.registry.register(NAME)
    splitters.registry.unregister(NAME)


@pytest.mark.parametrize("name", sorted({name for _, name in WRONG}))
def test_the_right_splitter_passes(name, register, monkeypatch) -> None:
    run(register(Right), name, monkeypatch)


@pytest.mark.parametrize("name", sorted({name for _, name in WRONG}))
def test_the_splitter_of_the_plug_in_page_passes(name, register, monkeypatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "pages" / "plugin.md").read_text(encoding="utf-8")
    [code] = re.findall(r'^```python title="dusk.py"\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(compile(code, "dusk.py", "exec"), found)
    run(register(found["Dusk"]), name, monkeypatch)


@pytest.mark.parametrize(("kind", "name"), WRONG, ids=lambda value: getattr(value, "__name__", "fails"))
def test_a_wrong_splitter_fails(kind, name, register, monkeypatch) -> None:
    with pytest.raises((AssertionError, PluginError, pytest.fail.Exception)):
        run(register(kind), name, monkeypatch)


def test_no_conformance_test_is_without_a_wrong_splitter() -> None:
    tests = {name.removeprefix("test_") for name in vars(test_splitters) if name.startswith("test_")}
    assert {name for _, name in WRONG} == tests - REFUSALS


def test_the_right_splitter_is_what_it_seems() -> None:
    assert Right().names(7, SEED) == ("bright", "dim")
    images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    assert [Right().transform_images(images, task).unique().tolist() for task in (0, 1)] == [[100], [50]]
