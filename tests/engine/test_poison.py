"""Which images are poisoned, what they are called, and which count for ASR: worked by hand."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine import poison
from backdoorbench_moe.engine.parts import Stamper
from backdoorbench_moe.engine.poison import (
    check_classes,
    plan_poison,
    poisoned,
    stamp_images,
    triggered_test,
)
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import create_trigger

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1])


def plan(seed: int = 0, **values: object) -> poison.PoisonPlan:
    return plan_poison(LABELS, PoisonSpec(**values), 3, seed)  # type: ignore[arg-type]


def invert(images: torch.Tensor) -> torch.Tensor:
    return 1 - images


def test_everything_poisoned_is_called_the_target() -> None:
    made = plan(rate=1.0, target=2)
    assert made.indices.tolist() == list(range(10))
    assert made.labels.tolist() == [2] * 10


def test_all_to_all_moves_each_class_to_the_next() -> None:
    assert plan(rate=1.0, mapping="all-to-all").labels.tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0, 2]


def test_clean_labels_come_from_the_target_class_and_stay() -> None:
    made = plan(rate=0.3, target=0, labels="clean")
    assert made.indices.tolist() == [0, 3, 6]
    assert made.labels.tolist() == [0, 0, 0]


def test_source_specific_takes_that_source_only() -> None:
    made = plan(rate=0.3, target=0, source=(2,))
    assert made.indices.tolist() == [2, 5, 8]
    assert made.labels.tolist() == [0, 0, 0]


def test_too_few_candidates_is_an_error_with_the_counts() -> None:
    with pytest.raises(ConfigError, match=r"0\.5 of 10 images is 5, but only 3 images can be poisoned"):
        plan(rate=0.5, source=(2,))


def test_the_draw_follows_the_seed_and_has_no_repeats() -> None:
    labels = torch.arange(1000) % 3
    draws = [plan_poison(labels, PoisonSpec(rate=0.1), 3, seed).indices for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert all(len(draw.unique()) == 100 for draw in draws)
    assert (labels[draws[0]] == 0).any()  # The target class is drawn from, too.


@pytest.mark.parametrize("values", [{"target": 3}, {"source": (0, 5)}, {"target": 1, "source": (1,)}])
def test_classes_the_data_do_not_have(values) -> None:
    with pytest.raises(ConfigError, match=r"poison\.(target|source)"):
        check_classes(PoisonSpec(**values), 3)


def test_the_planned_images_and_no_others_change_for_as_long_as_the_block_lasts() -> None:
    images, labels = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8), LABELS.clone()
    split, before = Split(images, labels), images.clone()
    made = plan(rate=0.4, target=1)
    others = torch.ones(10, dtype=torch.bool).index_fill(0, made.indices, False)
    with poisoned(split, made, invert) as seen:
        assert seen.images.data_ptr() == images.data_ptr()  # Held once.
        assert torch.equal(seen.images[made.indices], 255 - before[made.indices])
        assert torch.equal(seen.images[others], before[others])
        assert torch.equal(seen.labels[others], LABELS[others])
        assert seen.labels[made.indices].tolist() == [1] * 4
    assert torch.equal(split.images, before) and torch.equal(split.labels, LABELS)


def test_the_images_are_put_back_whatever_happens() -> None:
    split = Split(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), LABELS.clone())
    with pytest.raises(KeyboardInterrupt), poisoned(split, plan(rate=1.0, target=2), invert):
        raise KeyboardInterrupt
    assert (split.images == 0).all() and torch.equal(split.labels, LABELS)


def test_stamping_in_chunks_is_stamping_at_once(monkeypatch) -> None:
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    stamp = Stamper(create_trigger("warp", seed=3), create_applicator("patch", patch_size=4))
    whole = stamp_images(images, stamp)
    monkeypatch.setattr(poison, "CHUNK_VALUES", 5 * 3 * 8 * 8)
    assert torch.equal(stamp_images(images, stamp), whole)


def test_identity_survives_the_way_through_float() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(stamp_images(images, lambda x: x), images)


def make_test_set() -> ImageSet:
    split = Split(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), LABELS)
    return ImageSet("hand", split, split, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("spec", "true", "wanted"),
    [
        (PoisonSpec(target=0), [1, 2, 1, 2, 1, 2, 1], [0] * 7),
        (PoisonSpec(target=0, labels="clean"), [1, 2, 1, 2, 1, 2, 1], [0] * 7),
        (PoisonSpec(target=0, source=(0, 2)), [2, 2, 2], [0] * 3),
        (PoisonSpec(mapping="all-to-all"), LABELS.tolist(), [1, 2, 0, 1, 2, 0, 1, 2, 0, 2]),
    ],
)
def test_images_of_the_target_class_do_not_count_for_asr(spec, true, wanted) -> None:
    split, labels = triggered_test(make_test_set(), spec, invert)
    assert labels.tolist() == true
    assert split.labels.tolist() == wanted
    assert (split.images == 255).all()
