"""Spectral Signatures on planted rows, against NumPy, and how many images of a class are thrown out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import judged, normal, planted_task

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.spectral import outlier_scores
from backdoorbench_moe.errors import ConfigError


def test_planted_rows_are_found_although_all_vectors_are_far_from_zero() -> None:
    """Without centring, the first direction would be that of the mean, and the planted one would be unseen."""
    vectors, labels = normal(300, 8), torch.arange(300) % 3
    vectors[:, 0] += 500
    planted = (labels == 1).nonzero().squeeze(1)[10:16]
    vectors[planted, 5] += 12
    result = judged("spectral", planted_task(vectors, labels), epsilon=0.04)
    [judgement] = result.judgements
    assert result.stage == "judged"
    assert set(planted.tolist()) <= set(judgement.suspicious.tolist())
    assert judgement.scores[planted].min() > judgement.scores[~torch.isin(torch.arange(300), planted)].max()


def test_scores_are_those_of_numpy() -> None:
    vectors = normal(50, 6) * torch.tensor([1, 4, 2, 1, 1, 1])
    centred = vectors.double().numpy() - vectors.double().numpy().mean(0)
    first = np.linalg.svd(centred)[2][0]
    np.testing.assert_allclose(outlier_scores(vectors), (centred @ first) ** 2, rtol=1e-9, atol=1e-12)
    assert outlier_scores(torch.ones(4, 3)).tolist() == [0.0] * 4


@pytest.mark.parametrize(("epsilon", "removed"), [(0.1, [3, 9, 1]), (0.05, [1, 4, 0]), (0.6, [18, 54, 9])])
def test_the_share_is_of_each_class(epsilon, removed) -> None:
    """Of 20, 60 and 10 images floor(1.5 * 0.1 * n) are 3, 9 and 1; there is a class without images, too."""
    labels = torch.tensor([0] * 20 + [1] * 60 + [3] * 10)
    [judgement] = judged("spectral", planted_task(normal(90, 4), labels), epsilon=epsilon).judgements
    counts = labels[judgement.suspicious].bincount(minlength=4).tolist()
    assert [counts[0], counts[1], counts[3]] == removed and counts[2] == 0


def test_bad_input() -> None:
    for epsilon in (0, 0.7, float("nan")):
        with pytest.raises(ConfigError, match=r"epsilon: expected a number in \(0, 2/3\)"):
            create_defense("spectral", epsilon=epsilon)
    with pytest.raises(ConfigError, match=r"epsilon: 1\.5 \* 0\.01 of 60 images is less than one image"):
        create_defense("spectral", epsilon=0.01).count(60, 3)


def test_a_share_that_is_less_than_one_image_of_every_class_finds_nothing() -> None:
    """The classes are known only when the training set is there: it ends with scores, and no image is thrown out."""
    assert create_defense("spectral", epsilon=0.02).count(60, 3) == 0
    [judgement] = judged(
        "spectral", planted_task(normal(60, 4), torch.arange(60) % 3), epsilon=0.02
    ).judgements
    assert len(judgement.suspicious) == 0 and (judgement.scores > 0).any()
