"""Constancy by hand, blends, the threshold, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from defense_tasks import held_images, make_task, used_model

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.strip import (
    gate_constancy,
    mean_entropy,
    score_superpositions,
    selection_constancy,
    superimpose,
)
from backdoorbench_moe.errors import ConfigError


def selections(*sets: set[tuple[int, int]]) -> torch.Tensor:
    """(1, n, 2 experts, 3 patches) bool of sets of (expert, patch)."""
    table = torch.zeros(1, len(sets), 2, 3, dtype=torch.bool)
    for number, chosen in enumerate(sets):
        for expert, patch in chosen:
            table[0, number, expert, patch] = True
    return table


def test_jaccard_of_a_table_by_hand() -> None:
    """{a, b}, {b, c}, {a, b, c}: 1/3, 2/3 and 2/3, in the mean 5/9."""
    a, b, c = (0, 0), (0, 2), (1, 1)
    assert selection_constancy(selections({a, b}, {b, c}, {a, b, c})).tolist() == pytest.approx([5 / 9])
    assert selection_constancy(selections({a, b}, {a, b})).tolist() == [1.0]
    assert selection_constancy(selections({a}, {b})).tolist() == [0.0]
    assert selection_constancy(selections(set(), set())).tolist() == [1.0], "both chose the same: nothing"
    both = torch.cat([selections({a, b}, {b, c}), selections({a}, {a})])
    assert selection_constancy(both).tolist() == pytest.approx([1 / 3, 1.0])


def test_jaccard_agrees_with_pythons_sets() -> None:
    table = torch.rand(3, 5, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.3
    for row, found in zip(table, selection_constancy(table), strict=True):
        sets = [set(map(tuple, chosen.nonzero().tolist())) for chosen in row]
        pairs = [len(x & y) / len(x | y) for x, y in itertools.combinations(sets, 2)]
        assert found.item() == pytest.approx(sum(pairs) / len(pairs))


def test_divergence_of_gates_by_hand() -> None:
    """Two distributions without overlap diverge as far as two can; of 3/4, 1/4 and 1/4, 3/4 by hand."""
    apart = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert gate_constancy(apart).tolist() == pytest.approx([0.0])
    assert gate_constancy(apart[:, [0, 0, 0]]).tolist() == pytest.approx([1.0])
    near = torch.tensor([[[[0.75, 0.25]], [[0.25, 0.75]]]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert gate_constancy(near).tolist() == pytest.approx([1 - divergence / math.log(2)])


@pytest.mark.parametrize("dim", [2, 3])
def test_over_several_experts_or_tokens_it_is_the_mean_of_their_divergences(dim) -> None:
    gates = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    gates = gates / gates.sum(dim, keepdim=True)
    mean = gates.mean(1, keepdim=True)
    kl = (gates * (gates / mean).log()).sum(dim).mean((1, 2))
    torch.testing.assert_close(gate_constancy(gates), 1 - kl / math.log(5))


def test_entropy_by_hand() -> None:
    """Of two even classes ln 2, of a sure one 0; two blends an image."""
    logits = torch.tensor([[0.0, 0.0, -1e9], [0.0, -1e9, -1e9], [5.0, -1e9, -1e9], [5.0, -1e9, -1e9]])
    assert mean_entropy(logits, 2).tolist() == pytest.approx([math.log(2) / 2, 0.0])


def test_blends_by_hand() -> None:
    images = torch.tensor([0, 101, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    over = torch.tensor([10, 200], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert superimpose(images, over, "mean").flatten(1).tolist() == [[5, 100], [55, 150], [132, 227]]
    assert superimpose(images, over, "sum").flatten(1).tolist() == [[10, 200], [111, 255], [255, 255]]


def test_every_image_is_scored_over_its_own_blends_in_chunks(monkeypatch) -> None:
    """The score is the spread of the blends' means, which by hand is the spread of the overlays' halves."""
    monkeypatch.setattr("backdoorbench_moe.defenses.strip.CHUNK_VALUES", 3 * 2 * 3 * 4 * 4)
    images = torch.arange(8, dtype=torch.uint8).mul(20).reshape(8, 1, 1, 1).expand(8, 3, 4, 4)
    over = torch.tensor([0, 100], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    calls = []

    def constancy(blends, count):
        calls.append(len(blends))
        return blends.double().mean((1, 2, 3)).unflatten(0, (-1, count)).mean(1)

    scores = score_superpositions(images, overlays=over, mode="mean", constancy=constancy)
    assert scores.tolist() == pytest.approx([(20 * i // 2 + (20 * i + 100) // 2) / 2 for i in range(8)])
    assert calls == [6, 6, 4]


@pytest.mark.parametrize("statistic", ["jaccard", "jensen-shannon"])
def test_the_filter_scores_routing_of_blends_as_an_own_loop_does(statistic, monkeypatch) -> None:
    """With 600 blends, more than pass the model in one batch."""
    model = used_model()
    task, _ = make_task(model, clean=held_images(20))
    result = create_defense("routing-strip", statistic=statistic, blends=6, fpr=0.2)(task)
    images = torch.randint(0, 256, (100, 3, 32, 32), generator=torch.Generator().manual_seed(4)).byte()
    scores = result.filter.judge(images)
    over = result.filter.judge.keywords["overlays"]
    assert len(over) == 6 and {tuple(o.flatten()[:9].tolist()) for o in over} <= {
        tuple(i.flatten()[:9].tolist()) for i in task.clean.images
    }
    for place in (0, 57, 99):
        blends = torch.stack([(images[place].int() + o.int()) // 2 for o in over]).float() / 255
        with torch.no_grad():
            [routing] = model.forward_routed(blends).routing
        if statistic == "jaccard":
            sets = [set(map(tuple, chosen.nonzero().tolist())) for chosen in routing.selected]
            pairs = [len(x & y) / len(x | y) for x, y in itertools.combinations(sets, 2)]
            expected = sum(pairs) / len(pairs)
        else:
            gates = routing.gates.double()
            expected = 1 - ((gates * (gates / gates.mean(0)).log()).sum((1, 2)) / 4).mean() / math.log(6)
        assert scores[place].item() == pytest.approx(float(expected), abs=1e-5)


def test_the_threshold_is_of_images_that_are_laid_over_nothing() -> None:
    """24 images: 4 are laid over, of the other 20 the 5th highest sets the threshold for a quarter."""
    model = used_model()
    task, _ = make_task(model)
    result = create_defense("strip", blends=4, fpr=0.25)(task)
    over = {tuple(o.flatten().tolist()) for o in result.filter.judge.keywords["overlays"]}
    others = [image for image in task.clean.images if tuple(image.flatten().tolist()) not in over]
    assert len(over) == 4 and len(others) == 20
    scores = sorted(result.filter.judge(torch.stack(others)).tolist(), reverse=True)
    assert result.filter.threshold == pytest.approx(scores[4], abs=1e-6)
    assert result.filter.details == {"calibrated_on": 20}
    few = create_defense("strip", blends=4, fpr=0.25, calibrate=7)(make_task(model)[0])
    assert few.filter.details["calibrated_on"] == 7 and few.stage == "filtered"


def test_a_prediction_that_nothing_moves_is_the_most_suspicious() -> None:
    """A model that is sure of class 0 where the first pixel stays dark, else torn between two."""
    model = used_model()
    task, _ = make_task(model)

    def answers(_, images):
        dark = images[:, 0, 0, 0] < 20
        return torch.where(dark[:, None], torch.tensor([50.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]))

    from dataclasses import replace

    task.clean.images[:, 0, 0, 0] = 39
    result = create_defense("strip", blends=4, fpr=0.25)(replace(task, logits=answers))
    images = task.clean.images[:6].clone()
    images[:3, 0, 0, 0], images[3:, 0, 0, 0] = 0, 200
    scores = result.filter.judge(images)
    assert scores[:3].min() > scores[3:].max() and scores[:3].tolist() == pytest.approx([0.0] * 3)
    assert (scores[3:] <= result.filter.threshold).all(), "as sure as clean images are"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blends": 1}, "blends: expected an integer of at least 2, got 1"),
        ({"fpr": 0}, r"fpr: expected a number in \(0, 1\), got 0"),
        ({"fpr": 1}, "fpr: expected"),
        ({"calibrate": 5}, r"calibrate: expected enough images to set a threshold for fpr=0\.05, got 5"),
        ({"blend": "max"}, "blend: unknown 'max'"),
    ],
)
def test_values_out_of_range_are_refused(options, message) -> None:
    for name in ("strip", "routing-strip"):
        with pytest.raises(ConfigError, match=message):
            create_defense(name, **options)


def test_too_few_images_for_the_false_positive_rate_are_refused() -> None:
    defense = create_defense("strip", clean_fraction=1.0)
    assert defense.count(16 + 19, 3) == 35
    with pytest.raises(
        ConfigError, match=r"clean_fraction: 1\.0 of 34 images is 34; 16 are blended into the others"
    ):
        defense.count(34, 3)
    with pytest.raises(ConfigError, match="the 0 left are too few"):
        defense.count(10, 3)


def test_a_model_without_routing_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: expected a routed model, WideResNet has no routing"):
        create_defense("routing-strip").check(used_model("wide_resnet"))
    create_defense("strip").check(used_model("wide_resnet"))
