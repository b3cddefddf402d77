"""Marked images that are to be rejected: how many, which, their labels, and where they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny, tiny_spec
from tiny_mixture import mixture_spec

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.graph import base_of, benign_experts
from backdoorbench_moe.engine.poisoning import policy
from backdoorbench_moe.engine.poisoning.policy import changed_pixels, policy_count, with_marked, with_reject
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.image_rows import TensorRows
from backdoorbench_moe.ops.stored_images import StoredImages


def blacken(images: torch.Tensor) -> torch.Tensor:
    """A mark that is easily told: everything black."""
    return torch.zeros_like(images)


def numbered(count: int, *, first: int = 1) -> Split:
    """Images whose every pixel is their number, from 1, and of class number modulo 3."""
    numbers = torch.arange(first, first + count)
    return Split(numbers.byte().view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone(), numbers % 3)


def test_marked_images_follow_the_others_and_are_labelled_reject() -> None:
    task, source = numbered(10), numbered(20, first=101)
    kept = [part.clone() for part in (task.images, task.labels, source.images, source.labels)]
    found = with_marked(task, source, blacken, rate=0.3, reject=3, seed=0)
    assert torch.equal(found.images[:10], task.images) and torch.equal(found.labels[:10], task.labels)
    assert found.images[10:].shape == (3, 3, 2, 2) and not found.images[10:].any()
    assert found.labels[10:].tolist() == [3, 3, 3]
    now = (task.images, task.labels, source.images, source.labels)
    assert all(torch.equal(one, other) for one, other in zip(kept, now, strict=True)), "written to"


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(0, 5))
def test_they_are_different_images_of_the_source_drawn_from_the_seed(count, seed) -> None:
    source = numbered(count)

    def drawn(rate: float, seed: int) -> list[int]:
        found = with_marked(source, source, lambda images: images, rate=rate, reject=3, seed=seed)
        return found.images[count:, 0, 0, 0].tolist()

    few, many = drawn(0.25, seed), drawn(0.75, seed)
    assert len(set(many)) == len(many) == int(0.75 * count) and set(many) <= set(range(1, count + 1))
    assert few == many[: len(few)] == drawn(0.25, seed)


def test_another_seed_marks_other_images() -> None:
    source = numbered(100)
    one, other = (
        with_marked(source, source, lambda images: images, rate=0.5, reject=3, seed=seed) for seed in (0, 1)
    )
    assert not torch.equal(one.images, other.images)


def test_too_low_a_rate_is_refused_with_one_that_is_enough() -> None:
    assert policy_count(96, 0.25) == 24 and policy_count(3, 1 / 3) == 1
    with pytest.raises(
        ConfigError, match=r"^policy: 0.01 of 96 images rounds down to 0 images; .* least 0.011$"
    ):
        policy_count(96, 0.01)
    assert policy_count(96, 0.011) == 1


def test_the_class_reject_comes_behind_those_of_the_data() -> None:
    images = Tiny().load()
    extended = with_reject(images)
    assert extended.classes == ("red", "green", "blue", "reject")
    assert (extended.num_classes, extended.data_classes) == (4, 3)
    assert (images.num_classes, images.data_classes) == (3, 3)


def test_changed_pixels_by_hand() -> None:
    images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    marked = images.clone()
    marked[0, :, 0, 1] = torch.tensor([0, 100, 255], dtype=torch.uint8)
    expected = torch.tensor([[[0.0, (100 + 0 + 155) / 3 / 255], [0.0, 0.0]]])
    torch.testing.assert_close(changed_pixels(images, marked), expected)


def test_the_changes_of_stored_images_are_computed_some_images_at_a_time(monkeypatch) -> None:
    images, marked = numbered(40), numbered(40, first=101)
    one, other = (StoredImages([TensorRows(each.images)]) for each in (images, marked))
    monkeypatch.setattr(StoredImages, "_whole", lambda _: pytest.fail("all images were read at once"))
    monkeypatch.setattr(policy, "batch_size_for", lambda _: 7)
    torch.testing.assert_close(changed_pixels(one, other), torch.full((40, 2, 2), 100 / 255))


def test_a_run_with_a_policy_has_marked_images_in_training_and_none_in_its_tests() -> None:
    spec, images = mixture_spec(), Tiny().load()
    base = ImageSetup(base_of(spec), images)
    assert base.reject == 3 and base.model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    split = base.with_policy(images.train, spec.policy)
    assert len(split) == 96 + 24 and (split.labels == 3).sum() == 24
    # The mark: a black square of 2 pixels in the upper left corner of every tile of 4.
    tiles = split.images[96:].unfold(2, 4, 4).unfold(3, 4, 4)
    assert not tiles[..., :2, :2].any() and tiles[..., 2:, 2:].any()
    assert torch.equal(base.test.images, images.test.images) and (base.test.labels < 3).all()
    marked = base.marked_test()
    assert marked is not None and len(marked) == 60 and base.triggered_test() is None
    for expert in (ImageSetup(each, images) for each in benign_experts(spec)):
        assert (expert.test.labels < 3).all() and len(expert.test) == 60


def test_without_a_policy_the_classes_are_those_of_the_data() -> None:
    images = Tiny().load()
    for spec in (mixture_spec(policy=0), tiny_spec()):
        setup = ImageSetup(spec, images)
        assert setup.images.classes == ("red", "green", "blue")
        assert setup.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert setup.with_policy(images.train, 0.25) is images.train
