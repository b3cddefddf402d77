"""The conformance tests pass for right applicators and the documented one, and fail for wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backdoorbench_moe import applicators
from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.testing import test_applicators
from backdoorbench_moe.testing.making import make

NAME = "under-test"
Stamp = Callable[[Tensor], Tensor]


class HalfOf(Applicator):
    """The trigger on one half of the columns."""

    left = True

    def apply(self, images: Tensor, trigger: Stamp) -> Tensor:
        left, right = images.tensor_split(2, dim=-1)
        return torch.cat([trigger(left), right] if self.left else [left, trigger(right)], dim=-1)


class Drawn(HalfOf):
    """Draws the half from its seed."""

    def __init__(self, *, seed: int = 0) -> None:
        self.left = bool(torch.rand((), generator=generator(seed, "half")) < 0.5)


class DrawnFromTorch(HalfOf):
    def __init__(self) -> None:
        self.left = bool(torch.rand(()) < 0.5)


class SeedsTorch(HalfOf):
    def apply(self, images: Tensor, trigger: Stamp) -> Tensor:
        torch.manual_seed(0)
        return super().apply(images, trigger)


class WritesToTheResult(Applicator):
    def apply(self, images: Tensor, trigger: Stamp) -> Tensor:
        stamped = trigger(images)
        stamped[..., 0, 0] = images[..., 0, 0]
        return stamped


@pytest.fixture
def register() -> Iterator[Callable[[type[Applicator]], type[Applicator]]]:
    yield applicators.registry.register(NAME)
    applicators.registry.unregister(NAME)


@pytest.mark.parametrize("kind", [HalfOf, Drawn])
def test_right_applicators_pass(kind, register) -> None:
    register(kind)
    test_applicators.test_random_values_come_from_its_seed(NAME)
    test_applicators.test_the_results_of_the_trigger_are_not_written_to(make("applicator", NAME))


@pytest.mark.parametrize("kind", [DrawnFromTorch, SeedsTorch])
def test_an_applicator_that_uses_the_generator_of_torch_fails(kind, register) -> None:
    register(kind)
    with pytest.raises(AssertionError, match="torch's own generator was used"):
        test_applicators.test_random_values_come_from_its_seed(NAME)


def test_an_applicator_that_writes_to_the_results_of_the_trigger_fails() -> None:
    with pytest.raises(AssertionError, match="a result of the trigger was written to"):
        test_applicators.test_the_results_of_the_trigger_are_not_written_to(WritesToTheResult())


def small_canvas(applicator: Applicator, canvas: tuple[int, int]) -> None:
    """Run the test of shapes with a trigger that needs a canvas of 4x4 pixels."""
    trigger = make("trigger", "routing", seed=7)
    test_applicators.test_shape_type_and_range(applicator, trigger, canvas, torch.float32)


def test_a_trigger_may_refuse_canvases_below_4x4() -> None:
    """The applicator of the plug-in page, with a trigger that supports no canvas of 4x2 pixels."""
    page = (Path(__file__).parents[2] / "docs" / "pages" / "plugin.md").read_text(encoding="utf-8")
    [code] = re.findall(r'^```python title="left_half.py"\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(compile(code, "left_half.py", "exec"), found)
    with pytest.raises(pytest.skip.Exception, match="canvases with a side of 2 pixels"):
        small_canvas(found["LeftHalf"](), (4, 4))
    small_canvas(found["LeftHalf"](), (8, 12))


def test_an_error_for_larger_canvases_fails() -> None:
    class Refuses(Applicator):
        def apply(self, images: Tensor, trigger: Stamp) -> Tensor:
            trigger(images)
            raise ShapeError("no")

    with pytest.raises(ShapeError, match="no"):
        small_canvas(Refuses(), (4, 4))
