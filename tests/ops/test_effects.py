"""Means and differences of groups against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from backdoorbench_moe.ops.effects import Mean, differences, mean_of, means_of


def test_means_leave_out_nan_and_have_scipys_interval() -> None:
    values = torch.tensor([1.0, 2, 4, float("nan"), 8])
    got = mean_of(values)
    interval = stats.ttest_1samp([1.0, 2, 4, 8], 0).confidence_interval()
    assert (got.value, got.n) == (3.75, 4)
    assert (got.low, got.high) == pytest.approx(tuple(interval))
    assert mean_of(torch.tensor([2.0])) == Mean(2.0, 1, None, None)
    assert mean_of(torch.tensor([])) == Mean(None, 0, None, None)
    assert [mean.value for mean in means_of(torch.tensor([[1.0, 5], [3, 5]]))] == [2.0, 5.0]


@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_differences_are_scipys(seed: int, count: int, levels: int) -> None:
    """Few levels, so that there are ties."""
    generator = np.random.default_rng(seed)
    values, groups = generator.integers(0, levels, count) / 4.0, generator.random((3, count)) < 0.5
    groups[2] = False
    got = differences(torch.from_numpy(values), torch.from_numpy(groups))
    assert got[2] is None
    for group, found in zip(groups[:2], got[:2], strict=True):
        inside, outside = values[group], values[~group]
        if not (len(inside) and len(outside)):
            assert found is None
            continue
        assert found is not None and found.n == (len(inside), len(outside))
        pairs = inside[:, None] - outside[None]
        assert found.auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
        assert found.rank_biserial == pytest.approx((pairs > 0).mean() - (pairs < 0).mean())
        assert found.means == pytest.approx((inside.mean(), outside.mean()))
        if len(set(values)) > 1:
            test = stats.mannwhitneyu(inside, outside, method="asymptotic")
            assert found.p == pytest.approx(test.pvalue)
        else:
            assert found.p == 1 and found.cohens_d is None


def test_cohens_d_by_hand() -> None:
    """{1, 3} and {2, 6}: means 2 and 4, squares 2 and 8 over 2 degrees of freedom."""
    [found] = differences(torch.tensor([1.0, 2, 3, 6]), torch.tensor([[True, False, True, False]]))
    assert found is not None and found.cohens_d == pytest.approx(-2 / 5**0.5)
