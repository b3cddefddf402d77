"""Which images are poisoned, what they are called, and which count for ASR: worked by hand."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.attacks.base import PoisonPlan
from backdoorbench_moe.attacks.data_poisoning import DataPoisoning
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.engine.poisoning.poison import poisoned, stamp_images, stamp_places
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.ops import images as images_module
from backdoorbench_moe.triggers import create_trigger
from backdoorbench_moe.triggers.base import Trigger

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1])


def plan(seed: int = 0, **values: object) -> PoisonPlan:
    return DataPoisoning(poison=PoisonSpec(**values))(LABELS, num_classes=3, seed=seed)  # type: ignore[arg-type]


class Invert(Trigger):
    """The negative; as noise, as many 255ths as the place says."""

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """The negative."""
        return 1 - images

    def stamp_noise(self, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """As many 255ths as the place says."""
        return (places[:, None, None, None] / 255).expand_as(images).clone()


class Dimmed(Invert):
    """In training, a fifth of the negative."""

    def stamp_training(self, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """A fifth of the negative."""
        return self.stamp(images) / 5


INVERT = Stamper(Invert(), create_applicator("image"))


def test_the_planned_images_and_no_others_change_for_as_long_as_the_block_lasts() -> None:
    images, labels = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8), LABELS.clone()
    split, before = Split(images, labels), images.clone()
    made = plan(rate=0.4, target=1)
    others = torch.ones(10, dtype=torch.bool).index_fill(0, made.indices, False)
    with poisoned(split, made, INVERT) as seen:
        assert seen.images.data_ptr() == images.data_ptr()  # Held once.
        assert torch.equal(seen.images[made.indices], 255 - before[made.indices])
        assert torch.equal(seen.images[others], before[others])
        assert torch.equal(seen.labels[others], LABELS[others])
        assert seen.labels[made.indices].tolist() == [1] * 4
    assert torch.equal(split.images, before) and torch.equal(split.labels, LABELS)


def test_the_images_are_put_back_when_the_trigger_fails_after_a_group_was_stamped() -> None:
    class NoNoise(Invert):
        def stamp_noise(self, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no memory")

    split = Split(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), LABELS.clone())
    made = plan(rate=0.3, noise=0.3, target=2)
    failing = Stamper(NoNoise(), create_applicator("image"))
    with pytest.raises(RuntimeError, match="no memory"), poisoned(split, made, failing):
        pass
    assert (split.images == 0).all() and torch.equal(split.labels, LABELS)


def test_the_images_are_put_back_whatever_happens() -> None:
    split = Split(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), LABELS.clone())
    with pytest.raises(KeyboardInterrupt), poisoned(split, plan(rate=1.0, target=2), INVERT):
        raise KeyboardInterrupt
    assert (split.images == 0).all() and torch.equal(split.labels, LABELS)


def test_stamping_in_chunks_is_stamping_at_once(monkeypatch) -> None:
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    stamp = Stamper(create_trigger("warp", seed=3), create_applicator("patch", patch_size=4))
    whole = stamp_images(images, stamp)
    monkeypatch.setattr(images_module, "CHUNK_VALUES", 5 * 3 * 8 * 8)
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
    found = triggered_test(make_test_set(), DataPoisoning(poison=spec), INVERT)
    assert found.true.tolist() == true
    assert found.wanted.tolist() == wanted
    assert (found.images == 255).all()
    assert torch.equal(LABELS[found.places], found.true)


def test_every_group_gets_its_form_and_its_labels() -> None:
    images, labels = torch.full((10, 3, 4, 4), 10, dtype=torch.uint8), LABELS.clone()
    made = plan(rate=0.2, cover=0.3, noise=0.4, target=1)
    assert [len(group) for group in made.groups.values()] == [2, 3, 4]
    with poisoned(Split(images, labels), made, Stamper(Dimmed(), create_applicator("image"))) as seen:
        stamped = torch.cat([made.indices, made.cover])
        assert (seen.images[stamped] == 49).all(), "the training form of 10: (255 - 10) / 5"
        assert seen.images[made.noise, 0, 0, 0].tolist() == made.noise.tolist(), "a function of the place"
        assert seen.labels[made.indices].tolist() == [1, 1]
        rest = torch.ones(10, dtype=torch.bool).index_fill(0, made.indices, False)
        assert torch.equal(seen.labels[rest], LABELS[rest])
        left = rest.index_fill(0, torch.cat([made.cover, made.noise]), False)
        assert (seen.images[left] == 10).all() and left.sum() == 1
    assert (images == 10).all() and torch.equal(labels, LABELS)


def test_tiles_of_an_image_have_places_of_their_own() -> None:
    stamper = Stamper(Invert(), create_applicator("patch", patch_size=2))
    places = torch.tensor([3, 7])
    stamped = stamp_places(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), places, stamper.noise)
    assert stamped[:, 0, ::2, ::2].flatten(1).tolist() == [[12, 13, 14, 15], [28, 29, 30, 31]]


def test_images_of_every_chunk_have_their_own_places(monkeypatch) -> None:
    monkeypatch.setattr(images_module, "CHUNK_VALUES", 2 * 3 * 4 * 4)
    places = torch.tensor([3, 7, 9, 20, 41])
    stamped = stamp_places(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), places, INVERT.noise)
    assert stamped[:, 0, 0, 0].tolist() == places.tolist()


def test_an_attack_without_a_trigger_leaves_the_images() -> None:
    split = Split(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), LABELS.clone())
    made = plan(rate=0.5, target=2)
    with poisoned(split, made, None) as seen:
        assert (seen.images == 0).all() and (seen.labels[made.indices] == 2).all()
    found = triggered_test(make_test_set(), DataPoisoning(poison=PoisonSpec(target=0)), None)
    assert (found.images == 0).all() and len(found) == 7
