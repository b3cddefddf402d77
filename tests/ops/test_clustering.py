"""2-means against SciPy's with many random starts, and silhouettes by hand and by a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from backdoorbench_moe.ops.clustering import between_squares, silhouettes, two_means
from backdoorbench_moe.ops.components import principal_components


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def squares(points: np.ndarray, inside: np.ndarray) -> float:
    """Sum of squared distances from the means of two clusters."""
    return sum(((part - part.mean(0)) ** 2).sum() for part in (points[inside], points[~inside]) if len(part))


def test_the_smaller_cluster_of_points_on_a_line() -> None:
    assert two_means(column(0, 10, 1, 11, 2)).tolist() == [False, True, False, True, False]
    assert not two_means(column(4, 4, 4)).any() and not two_means(column(4)).any()
    assert not two_means(torch.zeros(5, 0, dtype=torch.float64)).any()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.03, 0.2, 0.5]),
    apart=st.sampled_from([0.0, 3.0, 9.0]),
)
def test_it_is_as_good_as_many_random_starts_in_any_order(seed: int, share: float, apart: float) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(120, 4)) * [2, 1, 1, 0.5]
    points[: int(share * 120)] += apart * generator.normal(size=4)
    principal, _ = principal_components(torch.from_numpy(points), 4)
    found = two_means(principal)
    with np.errstate(all="ignore"):
        tries = [kmeans2(points, 2, minit="++", rng=generator, missing="raise")[1] == 1 for _ in range(20)]
    best = min(squares(points, inside) for inside in tries)
    assert squares(points, found.numpy()) <= 1.01 * best
    assert 2 * found.sum() <= len(found)
    order = torch.from_numpy(generator.permutation(120))
    again = two_means(principal[order])
    assert torch.equal(again, found[order]) or (
        2 * found.sum() == len(found) and torch.equal(~again, found[order])
    )


def test_what_two_means_save_by_hand() -> None:
    """The squared distances from 4 sum to 40, and those from 1 and from 7 to 4."""
    points = column(0, 2, 6, 8)
    sides = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert between_squares(points, sides).tolist() == [36.0, 0.0]


def test_silhouettes_by_hand() -> None:
    """0 and 1 against 4: (4 - 1) / 4, (3 - 1) / 3, and 0 for the one that is alone."""
    inside = torch.tensor([False, False, True])
    assert silhouettes(column(0, 1, 4), inside).tolist() == pytest.approx([3 / 4, 2 / 3, 0])
    assert silhouettes(column(0, 1, 4), ~inside).tolist() == pytest.approx([3 / 4, 2 / 3, 0])
    assert silhouettes(column(0, 1, 4), torch.ones(3, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_silhouettes_agree_with_a_loop(monkeypatch) -> None:
    monkeypatch.setattr("backdoorbench_moe.ops.clustering.CHUNK_VALUES", 25 * 7)
    draws = torch.Generator().manual_seed(1)
    points = torch.randn(25, 3, generator=draws, dtype=torch.float64)
    inside = torch.rand(25, generator=draws) < 0.3
    for place, found in enumerate(silhouettes(points, inside)):
        apart = (points - points[place]).norm(dim=1)
        own, other = inside == inside[place], inside != inside[place]
        a, b = apart[own].sum() / (own.sum() - 1), apart[other].mean()
        assert found.item() == pytest.approx(((b - a) / max(a, b)).item())
