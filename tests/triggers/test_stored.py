"""Stored images: how they are recognised, a few at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
