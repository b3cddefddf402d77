"""Activation Clustering on planted clusters, the rules by hand, and why independent components need no rotation."""

from __future__ import annotations

import pytest
import torch
from planted import judged, normal, planted_task

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.activation_clustering import divide
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.clustering import silhouettes, two_means


def planted(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three classes of 60 round clouds; `count` images of class 2 lie elsewhere, in a direction of their own."""
    labels = torch.arange(180) % 3
    vectors = normal(180, 12) + 20 * torch.nn.functional.one_hot(labels, 12)
    places = (labels == 2).nonzero().squeeze(1)[:count]
    vectors[places, 7] += 15
    return vectors, labels, places


@pytest.mark.parametrize("reduce", ["ica", "pca"])
@pytest.mark.parametrize("rule", ["size", "silhouette", "both"])
def test_a_planted_cluster_is_thrown_out_and_nothing_of_it_missed(reduce, rule) -> None:
    vectors, labels, places = planted(15)
    task = planted_task(vectors, labels)
    options = {"silhouette": 0.2} if reduce == "pca" else {"silhouette": 0.12}
    samples, classes = judged("activation-clustering", task, reduce=reduce, rule=rule, **options).judgements
    chosen = labels[samples.suspicious] == 2
    assert samples.suspicious[chosen].tolist() == places.tolist()
    assert "2" in classes.suspicious and classes.details["smaller_share"]["2"] == 0.25
    if rule != "size":
        assert list(classes.suspicious) == ["2"] and chosen.all()
    others = torch.ones(180, dtype=torch.bool)
    others[places] = False
    assert samples.scores[places].min() > samples.scores[others].max()


@pytest.mark.parametrize(
    ("rule", "count", "found"),
    [
        ("size", 15, True),
        ("size", 24, False),
        ("silhouette", 24, True),
        ("both", 24, False),
        ("both", 15, True),
    ],
)
def test_a_share_of_24_of_60_is_not_small_but_separate(rule, count, found) -> None:
    task = planted_task(*planted(count)[:2])
    _, classes = judged("activation-clustering", task, rule=rule, silhouette=0.2).judgements
    assert ("2" in classes.suspicious) == found


def test_places_on_the_line_by_hand() -> None:
    """0, 0, 2 and 10: the means are 2/3 and 10; 2 is at 2 (2 - 16/3) / (28/3) = -5/7; 0 is beyond the mean."""
    smaller, line, separation = divide(torch.tensor([[0.0], [0.0], [2.0], [10.0]]), 10, whiten=False)
    assert smaller.tolist() == [False, False, False, True]
    assert line.tolist() == pytest.approx([-1, -1, -5 / 7, 1])
    # Mean distances within and to the other cluster: 1 and 10 twice, 2 and 8, and one that is alone.
    assert separation == pytest.approx((0.9 + 0.9 + 0.75 + 0) / 4)


def test_clusters_and_silhouettes_do_not_depend_on_a_rotation() -> None:
    """Independent components are whitened principal ones, rotated; divide(whiten=True) leaves out the rotation."""
    vectors = normal(80, 3) * torch.tensor([90.0, 2.0, 1.0])
    vectors[:12, 2] += 30
    smaller, line, separation = divide(vectors, 3, whiten=True)
    centred = vectors.double() - vectors.double().mean(0)
    # Any whitening: the inverse of a Cholesky factor, and a random rotation.
    factor = torch.linalg.cholesky(centred.T @ centred / 80)
    rotation = torch.linalg.qr(normal(3, 3, seed=2).double())[0]
    points = torch.linalg.solve_triangular(factor, centred.T, upper=False).T @ rotation
    assert torch.equal(two_means(points), smaller) and smaller.nonzero().squeeze(1).tolist() == list(
        range(12)
    )
    assert silhouettes(points, smaller).mean().item() == pytest.approx(separation)
    assert torch.equal(line > 0, smaller)
    assert not torch.equal(divide(vectors, 3, whiten=False)[0], smaller), (
        "unscaled, the first direction decides"
    )


def test_classes_of_equal_or_no_images_are_not_suspicious() -> None:
    labels = torch.tensor([0] * 5 + [2] * 1 + [3] * 4)
    for rule in ("size", "silhouette", "both"):
        samples, classes = judged(
            "activation-clustering", planted_task(torch.ones(10, 4), labels), rule=rule
        ).judgements
        assert not len(samples.suspicious) and not len(classes.suspicious)
        assert samples.scores.tolist() == [0] * 10 and classes.scores == {"0": 0, "3": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components: expected an integer of at least 1"),
        ({"size": 0.6}, r"size: expected a number in \(0, 0.5\]"),
        ({"silhouette": 1.0}, r"silhouette: expected a number in \(0, 1\)"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("activation-clustering", **options)
