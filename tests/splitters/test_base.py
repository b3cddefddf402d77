"""The checked call of a splitter: chunks, one rounding, and what a wrong subclass gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.ops import images as images_module
from backdoorbench_moe.ops.images import Split, change_images
from backdoorbench_moe.splitters.base import Splitter

LABELS = torch.tensor([2, 0, 1, 0, 2])
GIVEN = {"num_classes": 3, "seed": 0}


class Hand(Splitter):
    """Two tasks from two functions."""

    def __init__(
        self,
        transform: Callable[[Tensor], Tensor] = lambda images: images,
        members: Callable[[Tensor], object] = lambda labels: torch.arange(len(labels)),
    ) -> None:
        self._transform, self._members = transform, members

    def names(self, num_classes: int, seed: int) -> tuple[str, ...]:
        return ("one", "other")

    def members(self, labels: Tensor, task: int, **given: object) -> Tensor:
        return self._members(labels)  # type: ignore[return-value]

    def transform(self, images: Tensor, task: int) -> Tensor:
        return self._transform(images)


def split() -> Split:
    return Split(
        torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4).contiguous() * 50, LABELS
    )


def test_members_in_the_order_of_the_split() -> None:
    splitter = Hand(lambda images: 1 - images, lambda labels: (labels != 0).nonzero()[:, 0])
    found = splitter(split(), 1, **GIVEN)
    assert found.images[:, 0, 0, 0].tolist() == [255, 155, 55]
    assert found.labels.tolist() == [2, 1, 2]


def test_values_are_rounded_to_the_nearest_level() -> None:
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for value, level in ((0.49, 0), (0.51, 1), (254.4, 254), (254.6, 255), (256, 255), (-1, 0)):
        found = Hand(lambda images, value=value: images + value / 255).transform_images(images, 0)
        assert (found == level).all(), value


def test_chunks_are_floats_of_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "CHUNK_VALUES", 2 * 3 * 4 * 4 + 1)
    seen = []
    Hand(lambda images: seen.append(images.clone()) or images).transform_images(split().images, 0)
    assert [len(chunk) for chunk in seen] == [2, 2, 1]
    assert all(chunk.dtype == torch.float32 for chunk in seen)
    torch.testing.assert_close(torch.cat(seen) * 255, split().images.float())


def test_a_chunk_has_at_least_one_image_and_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "CHUNK_VALUES", 1)
    parts = []
    change_images(split().images, lambda chunk, part: parts.append(part.start) or chunk)
    assert parts == [0, 1, 2, 3, 4]
    assert change_images(split().images[:0], lambda chunk, _: chunk).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda images: images * 2 - 1, r"expected values in \[0, 1\]"),
        (lambda images: images * float("nan"), r"expected values in \[0, 1\], got nan"),
        (lambda images: images / 0, r"expected values in \[0, 1\]"),
        (lambda images: images[:1], r"expected torch.float32 \(5, 3, 4, 4\)"),
        (lambda images: images.mean(1, keepdim=True), r"got torch.float32 \(5, 1, 4, 4\)"),
        (lambda images: images.bfloat16(), "got torch.bfloat16"),
        (lambda images: images.byte(), "expected a float tensor"),
        (lambda images: None, "got NoneType"),
    ],
)
def test_wrong_images_are_the_plugins_fault(transform: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(PluginError, match=f"output of splitter Hand: .*{message}"):
        Hand(transform)(split(), 0, **GIVEN)


@pytest.mark.parametrize(
    ("members", "got"),
    [
        ([0, 1], "list"),
        (torch.ones(5, dtype=torch.bool), r"torch.bool \(5,\)"),
        (torch.tensor([[0, 1]]), r"torch.int64 \(1, 2\)"),
        (torch.tensor([1, 0]), r"\[1, 0\]"),
        (torch.tensor([1, 1]), r"\[1, 1\]"),
        (torch.tensor([-1, 2]), r"\[-1, 2\]"),
        (torch.tensor([3, 5]), r"\[3, 5\]"),
    ],
)
def test_wrong_members_are_the_plugins_fault(members: object, got: str) -> None:
    with pytest.raises(
        PluginError, match=f"splitter Hand: expected members .* below 5 on the CPU, got {got}"
    ):
        Hand(members=lambda labels: members)(split(), 0, **GIVEN)


def test_a_task_without_images_is_named() -> None:
    splitter = Hand(members=lambda labels: labels[:0])
    with pytest.raises(ConfigError, match=r"splitter: expected images of task 1 \(other\), got none of 5"):
        splitter(split(), 1, **GIVEN)


def test_by_default_there_may_be_more_tasks_than_experts() -> None:
    for experts in (1, 2):
        Hand().check(experts, 3, 0)
    with pytest.raises(
        ConfigError, match=r"mixture\.experts: expected at most 2, the tasks of splitter Hand, got 3"
    ):
        Hand().check(3, 3, 0)


def test_no_gradients_are_recorded() -> None:
    weight = torch.ones((), requires_grad=True)
    assert not Hand(lambda images: images * weight).transform_images(split().images, 0).requires_grad
