"""Siblings that stand out, against tests computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from backdoorbench_moe.auditing.siblings import find_standout

NAMES = [f"moe/{n}" for n in range(6)]
values_of = st.lists(st.floats(0.1, 100), min_size=3, max_size=6)


def test_the_surprise_is_that_of_a_t_test_with_bonferroni() -> None:
    values = [1.0, 1.2, 0.9, 1.1, 10.0]
    found, by_name = find_standout(
        {"row": dict(zip(NAMES, values, strict=False)), "norm": {"a": 1, "b": 2, "c": 1.5}}
    )
    logs = np.log(values)
    others, own = logs[:4], logs[4]
    statistic = (own - others.mean()) / (others.std(ddof=1) * math.sqrt(1 + 1 / 4))
    chance = 2 * t.sf(abs(statistic), 3) * 8  # Eight values are compared in all.
    assert found.name == "moe/4" and found.quantity == "row"
    assert found.ratio == pytest.approx(10 / np.exp(others.mean()))
    assert found.surprise == pytest.approx(-math.log10(chance), rel=1e-6)
    assert by_name["moe/4"] == found.surprise and by_name["moe/0"] < found.surprise


def test_equal_siblings_and_small_differences_are_no_surprise() -> None:
    assert find_standout({"row": dict.fromkeys(NAMES, 3.0)})[0].surprise == 0
    nearly = dict.fromkeys(NAMES, 3.0) | {"moe/2": 3.1}
    assert find_standout({"row": nearly})[0].surprise == 0
    assert find_standout({"row": nearly | {"moe/2": 3.2}})[0].surprise > 10


def test_a_direction_ignores_the_other() -> None:
    small = dict(zip(NAMES, [3.0, 3.2, 0.5, 2.9, 3.1, 3.0], strict=True))
    assert find_standout({"row": small})[0].name == "moe/2"
    assert find_standout({"row": small}, direction="up")[0].surprise == 0
    both, down = (find_standout({"row": small}, direction=d)[0].surprise for d in ("both", "down"))
    # One side has half of the probability.
    assert down == pytest.approx(both + math.log10(2))


def test_a_muted_sibling_stands_out_and_all_muted_ones_cannot_be_compared() -> None:
    found, _ = find_standout({"norm": dict.fromkeys(NAMES, 3.0) | {"moe/1": 0.0}})
    assert found.name == "moe/1" and math.isfinite(found.surprise) and found.surprise > 2
    for quantities in ({}, {"norm": {"a": 1.0, "b": 2.0}}, {"norm": dict.fromkeys(NAMES, 0.0)}):
        with pytest.raises(ValueError, match="expected 3 siblings"):
            find_standout(quantities)


@given(values=values_of, factor=st.floats(0.01, 100), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_neither_order_nor_scale_matters(values, factor, order) -> None:
    named = dict(zip(NAMES, values, strict=False))
    shuffled = list(named.items())
    order.shuffle(shuffled)
    first = find_standout({"row": named})[1]
    second = find_standout({"row": {name: factor * value for name, value in shuffled}})[1]
    assert first.keys() == second.keys()
    for name, surprise in first.items():
        assert second[name] == pytest.approx(surprise, rel=1e-4, abs=1e-4)


def test_normal_siblings_are_rarely_surprising() -> None:
    draws = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        logs = torch.randn(8, generator=draws) * 0.3
        found, _ = find_standout({"row": {str(n): math.exp(x) for n, x in enumerate(logs.tolist())}})
        hits += found.surprise > 2
    assert hits <= 10  # 1% of 300 is 3; 10 would be a chance of one in a thousand.
