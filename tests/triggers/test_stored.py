"""Stored images: how they are recognised, a few at a time, and where they cannot be used."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny, tiny_spec
from tiny_mixture import mixture_spec
from torch import Tensor

from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import stored
from backdoorbench_moe.triggers.stored import StoredTrigger, image_keys, read_stored, write_stored

PLACES = torch.tensor([1, 4])


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The numbers of images whose keys are computed at once, of which three are a chunk."""
    found: list[int] = []

    def keys(images: Tensor) -> Tensor:
        found.append(len(images))
        return image_keys(images)

    monkeypatch.setattr(stored, "CHUNK", 3)
    monkeypatch.setattr(stored, "image_keys", keys)
    return found


def drawn(count: int, seed: int) -> Tensor:
    """Different images of 4x4 pixels."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=draws).byte()


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_the_keys_of_some_images_at_a_time_are_those_of_all_at_once(count, sizes, tmp_path) -> None:
    clean, images = drawn(count, 1), drawn(count, 2)
    write_stored(tmp_path / "stored", clean, images, PLACES, drawn(2, 3))
    assert max(sizes) <= 3 and sum(sizes) == count
    keys, order = image_keys(clean / 255).sort(stable=True)
    found = read_stored(tmp_path / "stored")
    assert torch.equal(found["keys"], keys) and torch.equal(found["images"], images[order])


def test_the_images_that_are_not_stored_are_counted_some_at_a_time(sizes, tmp_path) -> None:
    clean, other = drawn(7, 1), drawn(5, 4)
    write_stored(tmp_path / "stored", clean, drawn(7, 2), PLACES, drawn(2, 3))
    trigger = StoredTrigger(file=str(tmp_path / "stored"))
    del sizes[:]
    mixed = torch.cat([other[:2], clean[3:], other[2:], clean[:3]])
    assert trigger.missing(mixed) == 5 and max(sizes) == 3 and sum(sizes) == 12
    assert trigger.missing(clean) == 0 == trigger.missing(clean[:0])
    assert StoredTrigger().missing(other) == 5


MARKED = "trigger: expected one that can stamp any image, as the mark of images, got 'stored'"
BATCHES = "trigger: expected one that can stamp any image, where batches are poisoned, got 'stored'"
TILES = "applicator: expected one that stamps the complete image, for the trigger 'stored', got 'patch'"
BENIGN = {"attack": None, "mixture": {"poisoned_experts": []}}


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (tiny_spec, {"applicator": "patch"}, TILES),
        (tiny_spec, {"applicator": "image", "attack": "training-control"}, BATCHES),
        (mixture_spec, {"applicator": "image"}, MARKED),
        (mixture_spec, {"applicator": "image", "policy": 0}, MARKED),
        (mixture_spec, {"applicator": "image", **BENIGN}, MARKED),
    ],
    ids=["tiles", "every batch", "policy and harmful queries", "harmful queries", "policy"],
)
def test_uses_in_which_images_would_stay_as_they_are_are_refused(make, values, message, tmp_path) -> None:
    """All test and training images are stored, but are not recognised, or not stamped as such."""
    images, path = Tiny().load(), tmp_path / "stored"
    places = torch.arange(len(images.train))
    write_stored(path, images.test.images, 255 - images.test.images, places, 255 - images.train.images)
    trigger = {"name": "stored", "file": str(path)}
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ImageSetup(make(trigger=trigger, **values), images)
    setup = ImageSetup(tiny_spec(trigger=trigger), images)
    triggered = setup.triggered_test()
    assert triggered is not None
    assert torch.equal(triggered.images, 255 - images.test.images[triggered.places])
