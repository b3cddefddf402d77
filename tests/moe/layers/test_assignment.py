"""Choosing experts and their capacity on hand-worked tables of gates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.moe.layers import assign_chosen, expert_capacity, top_experts, within_capacity

# Four tokens, three experts; the first choices are 0, 0, 1, 0, the second ones 1, 2, 0, 2.
GATES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.2, 0.7, 0.1], [0.9, 0.04, 0.06]])
CHOSEN = [[0, 1], [0, 2], [1, 0], [0, 2]]


def test_the_largest_gates_are_chosen_and_of_equals_the_first():
    assert top_experts(GATES, 2).tolist() == CHOSEN
    assert top_experts(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("capacity", "kept"),
    [
        # By priority tokens come as 3, 2, 0, 1. Expert 0: first choices of 3, 0, 1, then second of 2.
        (1, [[False, False], [False, False], [True, False], [True, True]]),
        (2, [[True, True], [False, True], [True, False], [True, True]]),
        (3, [[True, True], [True, True], [True, False], [True, True]]),
        (4, [[True, True]] * 4),
    ],
)
def test_room_goes_by_batch_priority_first_choices_first(capacity, kept):
    assert within_capacity(GATES, torch.tensor(CHOSEN), capacity).tolist() == kept


def test_pairs_lie_by_expert_those_without_room_last():
    chosen = torch.tensor(CHOSEN)
    kept = within_capacity(GATES, chosen, 1)
    found = assign_chosen(GATES, chosen, kept, 1)
    assert found.counts.tolist() == [4, 2, 2] and found.experts.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert found.tokens.tolist() == [3, 0, 1, 2, 2, 0, 3, 1]
    assert found.weights.tolist() == pytest.approx([0.9, 0, 0, 0, 0.7, 0, 0.06, 0])


@given(tokens=st.integers(1, 12), experts=st.integers(1, 5), capacity=st.integers(1, 12), data=st.data())
def test_room_is_never_exceeded_nor_left_while_someone_waits(tokens, experts, capacity, data):
    top_k = data.draw(st.integers(1, experts))
    gates = torch.rand(
        tokens, experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    )
    chosen = top_experts(gates, top_k)
    kept = within_capacity(gates, chosen, capacity)
    for expert in range(experts):
        asked = chosen == expert
        assert (kept & asked).sum() == min(capacity, int(asked.sum()))


@pytest.mark.parametrize(
    ("sizes", "room"),
    [((100, 8, 2, 1.05), 27), ((100, 5, 1, 1.05), 21), ((64, 4, 1, 1.0), 16), ((65, 8, 2, 1.0), 17)],
)
def test_capacity_is_rounded_up_as_the_factor_is_written(sizes, room):
    assert expert_capacity(*sizes) == room
