"""SCAn: the likelihood ratio by hand and by SciPy, the covariance by a loop, and a planted class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import judged, normal, planted_task
from scipy.stats import multivariate_normal

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.scan import RIDGE, split_class, within_covariance
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.components import principal_components

NONE = torch.empty(0, 2, dtype=torch.float64)


def test_the_ratio_of_two_gaussians_is_the_closed_form() -> None:
    """With a share p at a distance d, log(L2 / L1) / n tends to p (1 - p) d^2 / 2: 0.2 * 0.8 * 100 / 2 = 8."""
    exact = torch.zeros(10, 2, dtype=torch.float64)
    exact[:2, 1] = 10
    assert split_class(exact, NONE).ratio == pytest.approx(8)
    points = normal(4000, 2).double()
    points[:800, 1] += 10
    assert split_class(points, NONE).ratio == pytest.approx(8, rel=0.03)
    # Two halves of one Gaussian along one direction: E|x|^2 / 2 = 1 / pi.
    assert split_class(normal(20000, 1).double(), NONE[:, :1]).ratio == pytest.approx(1 / np.pi, rel=0.03)


def test_ratio_and_scores_are_those_of_scipys_densities() -> None:
    points = normal(60, 2, seed=3).double()
    points[:9] += 6
    found = split_class(points, NONE)
    inside = (found.scores > 0).numpy()
    assert inside.nonzero()[0].tolist() == list(range(9))
    x = points.numpy()
    one = multivariate_normal.logpdf(x, x.mean(0))
    ours, other = (multivariate_normal.logpdf(x, x[rows].mean(0)) for rows in (inside, ~inside))
    np.testing.assert_allclose(found.scores, ours - other, rtol=1e-9, atol=1e-9)
    assert found.ratio == pytest.approx((np.where(inside, ours, other) - one).mean())


def test_the_covariance_is_that_around_the_means_of_the_classes() -> None:
    points, labels = normal(40, 3).double(), torch.tensor([0, 2, 5, 5] * 10)
    points += 100 * labels.unsqueeze(1)
    expected = sum(
        (len(part) - 1) * np.cov(part.T) for part in (points[labels == k].numpy() for k in (0, 2, 5))
    ) / (40 - 3)
    found = within_covariance(points, labels, smallest=torch.tensor(0.0))
    np.testing.assert_allclose(found, expected + RIDGE * np.diag(expected).mean() * np.eye(3))


def variant(share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six classes with one covariance, which is far from round; a share of class 4 is another group."""
    mix = normal(8, 8, seed=9) @ torch.diag(torch.linspace(0.2, 6, 8))
    means = 30 * normal(6, 8, seed=8)
    labels, known = torch.arange(600) % 6, torch.arange(120) % 6
    vectors = means[labels] + normal(600, 8, seed=seed) @ mix
    # 8 standard deviations in the metric of the covariance, and not the direction of largest variance.
    places = (labels == 4).nonzero().squeeze(1)[: int(share * 100)]
    vectors[places] += 8 * mix[0]
    return vectors, labels, means[known] + normal(120, 8, seed=seed + 1) @ mix, known


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_a_planted_group_is_found_small_or_large(share) -> None:
    """Above one half, only the clean images tell which group is the planted one."""
    vectors, labels, clean, known = variant(share)
    samples, classes = judged("scan", planted_task(vectors, labels, clean, known)).judgements
    planted = (labels == 4).nonzero().squeeze(1)[: int(share * 100)]
    assert list(classes.suspicious) == ["4"] and classes.scores["4"] > classes.threshold == pytest.approx(
        np.e**2
    )
    assert samples.suspicious.tolist() == planted.tolist()
    others = torch.ones(600, dtype=torch.bool)
    others[planted] = False
    assert samples.scores[planted].min() > samples.scores[others].max()


def test_without_a_group_nothing_is_suspicious_and_large_classes_are_not_either() -> None:
    for seed in range(5):
        vectors, labels, clean, known = variant(0, seed=10 * seed)
        few = (labels != 2) | (torch.arange(600) < 120)
        samples, classes = judged("scan", planted_task(vectors[few], labels[few], clean, known)).judgements
        assert not len(classes.suspicious) and not len(samples.suspicious)
        assert max(classes.scores.values()) < np.e**2


def test_there_are_at_most_half_as_many_components_as_degrees_of_freedom(monkeypatch) -> None:
    """Twelve clean images of three classes leave nine for the covariance, so that of eight dimensions four are used."""
    wanted: list[int] = []

    def count(vectors: torch.Tensor, components: int):
        wanted.append(components)
        return principal_components(vectors, components)

    monkeypatch.setattr("backdoorbench_moe.defenses.scan.principal_components", count)
    judged(
        "scan", planted_task(normal(60, 8), torch.arange(60) % 3, normal(12, 8, seed=1), torch.arange(12) % 3)
    )
    assert wanted == [4] * 4, "once for all images, and once for each class"


def test_equal_vectors_are_not_suspicious() -> None:
    labels = torch.arange(12) % 3
    task = planted_task(torch.ones(12, 4), labels, torch.ones(6, 4), labels[:6])
    samples, classes = judged("scan", task).judgements
    assert samples.scores.tolist() == [0] * 12 and set(classes.scores.values()) == {0.0}


def test_clean_vectors_that_are_equal_within_their_classes_give_finite_scores() -> None:
    """Such as copies of one image; without a least variance, the whitened vectors overflow."""
    vectors, labels, clean, known = variant(0)
    task = planted_task(vectors, labels, clean[:6].repeat(2, 1), known[:6].repeat(2))
    samples, classes = judged("scan", task).judgements
    assert samples.scores.isfinite().all() and np.isfinite(list(classes.scores.values())).all()
    same = within_covariance(torch.zeros(9, 3).double(), torch.arange(9) % 3, smallest=torch.tensor(4.0))
    np.testing.assert_allclose(same, 4 * RIDGE * np.eye(3))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="components: expected an integer of at least 1"):
        create_defense("scan", components=0)
    with pytest.raises(ConfigError, match="threshold: expected a positive number"):
        create_defense("scan", threshold=-1)
    with pytest.raises(ConfigError, match=r"scan: .* expected at least 3 classes, got 2"):
        create_defense("scan").count(1000, 2)
    with pytest.raises(
        ConfigError, match=r"clean_fraction: 0\.05 of 200 images is 10; expected at least 12, two more"
    ):
        create_defense("scan").count(200, 10)
    assert create_defense("scan").count(240, 10) == 12
