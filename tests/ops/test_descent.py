"""Descents on losses whose best values within the bounds are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.ops.descent import adam_descent, signed_descent


@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
@settings(max_examples=20, deadline=None)
def test_a_linear_loss_ends_in_the_corner_against_its_gradient(seed: int, strength: float) -> None:
    weights = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    start = torch.full((6,), 0.5)
    found = signed_descent(
        lambda values, _: (values * weights).sum(),
        start,
        range(30),
        step=strength / 3,
        low=start - strength,
        high=start + strength,
    )
    torch.testing.assert_close(found, start - strength * weights.sign())
    assert torch.equal(start, torch.full((6,), 0.5)), "the start was written to"


def test_the_steps_have_the_given_length() -> None:
    found = signed_descent(lambda v, _: -v.sum(), torch.zeros(2), range(3), step=0.1, low=-1.0, high=1.0)
    torch.testing.assert_close(found, torch.full((2,), 0.3))


@pytest.mark.parametrize(("goal", "expected"), [(0.3, 0.3), (2.0, 0.6), (-2.0, 0.0)])
def test_adam_finds_the_nearest_allowed_value(goal: float, expected: float) -> None:
    found = adam_descent(
        lambda v, _: (v - goal).square().sum(), torch.ones(3) * 0.5, range(300), lr=0.02, low=0.0, high=0.6
    )
    torch.testing.assert_close(found, torch.full((3,), expected), atol=5e-3, rtol=0)
    assert not found.requires_grad


def test_each_step_has_its_batch() -> None:
    seen = []
    adam_descent(
        lambda v, b: (v * b).sum() + (seen.append(b) or 0), torch.ones(1), (5, 6), lr=0.1, low=0, high=1
    )
    assert seen == [5, 6]
