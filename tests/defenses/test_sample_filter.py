"""What judges training images: the vectors, the order of the training set, and the training that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model
from planted import judged, normal, planted_task
from torch import nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.sample_filter import SampleFilter, without
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import content_order
from backdoorbench_moe.testing import making

NAMES = ("spectral", "activation-clustering", "scan", "abl")


def tiny(name: str, **options: object):
    return making.make("defense", name, **options)


def test_the_order_of_contents_is_the_same_for_every_order() -> None:
    split = making.coloured_split(48, 2)
    # Two images that differ in the label, and two that differ in one pixel.
    split.images[1], split.images[3] = split.images[0], split.images[2]
    split.images[3, 2, 31, 31] ^= 1
    assert split.labels[0] != split.labels[1]
    mixed = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    order = content_order(split)
    again = mixed[content_order(Split(split.images[mixed], split.labels[mixed]))]
    assert torch.equal(order, again) and sorted(order.tolist()) == list(range(48))
    assert not torch.equal(order, torch.arange(48))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"on": on}) for name in NAMES[:3] for on in ("features", "routing", "routing-map")),
        ("abl", {}),
    ],
    ids=str,
)
def test_a_shuffled_training_set_gives_equal_verdicts_and_an_equal_model(name, options) -> None:
    mixed = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    results = []
    for order in (torch.arange(48), mixed):
        task, _ = make_task(used_model())
        split = task.training_set
        shuffled = Split(split.images[order], split.labels[order])
        task = replace(task, granted={**task.granted, "training-set": shuffled})
        results.append(tiny(name, **options)(task))
    (one, *_), (two, *_) = (result.judgements for result in results)
    assert 0 < len(one.suspicious) < 48
    assert sorted(mixed[two.suspicious].tolist()) == one.suspicious.tolist()
    assert torch.equal(two.scores, one.scores[mixed])
    assert not changed(*(copies(result.model) for result in results))


@pytest.mark.parametrize("name", NAMES[:3])
def test_scores_are_equal_in_another_order_without_the_order_of_contents(name, monkeypatch) -> None:
    """Neither 2-means nor the components depend on the order, but for rounding."""
    monkeypatch.setattr(
        "backdoorbench_moe.defenses.sample_filter.content_order", lambda split: torch.arange(len(split))
    )
    vectors, labels = normal(150, 6) * torch.tensor([3, 2, 1, 1, 1, 1]), torch.arange(150) % 3
    vectors[:9, 4] += 9
    mixed = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    clean, known = normal(60, 6, seed=5), torch.arange(60) % 3
    one, *_ = judged(name, planted_task(vectors, labels, clean, known)).judgements
    two, *_ = judged(name, planted_task(vectors[mixed], labels[mixed], clean, known)).judgements
    torch.testing.assert_close(two.scores, one.scores[mixed])
    assert sorted(mixed[two.suspicious].tolist()) == one.suspicious.tolist()


class Kept(SampleFilter):
    """Keeps the vectors that it is given."""

    def judge(self, task, vectors, split):
        """Keep them."""
        self.vectors = vectors
        raise StopIteration


def vectors_of(model: nn.Module, on: str) -> tuple[torch.Tensor, torch.Tensor]:
    task, _ = make_task(model)
    defense = Kept(on=on)
    with pytest.raises(StopIteration):
        defense(replace(task, granted={need: task.granted[need] for need in defense.needs}))
    images = task.training_set.images
    return defense.vectors, images[content_order(task.training_set)].float() / 255


def test_the_vectors_are_features_or_the_gates_of_every_expert_sorted_or_in_their_places() -> None:
    model = used_model()
    vectors, images = vectors_of(model, "features")
    with torch.no_grad():
        torch.testing.assert_close(vectors, model.extract_features(images), rtol=1e-4, atol=1e-5)
        [routing] = model.forward_routed(images).routing
    experts, patches = routing.gates.shape[1:]
    placed = vectors_of(model, "routing-map")[0].view(48, experts, patches)
    torch.testing.assert_close(placed, routing.gates, rtol=1e-4, atol=1e-6)
    # Means over the patches are the same for every image.
    assert routing.gates.mean(2).std(0).max() < 1e-6 < routing.gates.std(0).max()
    ranked = vectors_of(model, "routing")[0].view(48, experts, patches)
    assert (ranked.diff(dim=2) <= 0).all()
    torch.testing.assert_close(ranked, placed.sort(2, descending=True).values)


def test_routing_needs_a_routed_model_and_no_features() -> None:
    for name in NAMES[:3]:
        for on in ("routing", "routing-map"):
            with pytest.raises(ConfigError, match=r"model: expected a routed model, .* has no routing"):
                create_defense(name, on=on).check_model(used_model("wide_resnet"))
        routed = create_defense(name, on="routing")
        assert "features" not in routed.needs and "training-set" in routed.needs
        assert "features" in create_defense(name).needs


class Trainings:
    """Stands for `Tune`."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Split, dict[str, object]]] = []

    def __call__(self, model: nn.Module, split: Split, **options: object) -> None:
        self.calls.append((model, split, options))


@pytest.mark.parametrize(("options", "epochs"), [({}, 11), ({"epochs": 3}, 3)])
def test_a_new_model_is_trained_with_the_runs_recipe_on_what_is_left(options, epochs) -> None:
    model, tune = used_model(), Trainings()
    task, reported = make_task(model, epochs=11)
    before = copies(model)
    result = create_defense("spectral", epsilon=0.1, **options)(replace(task, tune=tune))
    [(new, split, given)] = tune.calls
    assert (result.stage, result.model, given, reported) == ("retrained", new, {"epochs": epochs}, [])
    assert (
        new is not model and not changed(copies(task.fresh()), copies(new)) and changed(before, copies(new))
    )
    out = result.judgements[0].suspicious
    left = torch.ones(48, dtype=torch.bool)
    left[out] = False
    want = [tuple(row) for row in task.training_set.images[left].flatten(1).tolist()]
    assert sorted(map(tuple, split.images.flatten(1).tolist())) == sorted(want)
    assert sorted(split.labels.tolist()) == sorted(task.training_set.labels[left].tolist())


@pytest.mark.parametrize(
    ("name", "options"),
    [("activation-clustering", {"silhouette": 0.999}), ("spectral", {"epsilon": 0.1, "retrain": False})],
)
def test_if_nothing_is_suspicious_or_no_training_is_wanted_the_model_stays(name, options) -> None:
    model, tune = used_model(), Trainings()
    task, _ = make_task(model)
    result = create_defense(name, **options)(replace(task, tune=tune))
    assert (result.stage, result.model, tune.calls) == ("judged", model, [])
    assert bool(len(result.judgements[0].suspicious)) == (name == "spectral")


@pytest.mark.parametrize(
    ("removed", "batch_size", "left"), [(3, 8, 45), (3, 11, 44), (7, 40, 40), (47, 8, 1)]
)
def test_no_last_batch_of_one_image(removed, batch_size, left) -> None:
    """Of 48 images 45 are left, 4 batches of 11 and one image: the most suspicious of those that are left goes, too."""
    split, scores = making.coloured_split(48, 2), torch.arange(48.0)
    kept = without(split, scores >= 48 - removed, scores, batch_size)
    assert torch.equal(kept.images, split.images[:left]) and torch.equal(kept.labels, split.labels[:left])
