"""How many inputs are passed through a model at a time."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.ops.images import batch_size_for


@pytest.mark.parametrize(
    ("side", "images"), [(8, 500), (32, 500), (64, 500), (128, 125), (224, 40), (3000, 1)]
)
def test_images_larger_than_64x64_come_in_smaller_batches(side, images) -> None:
    assert batch_size_for(torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")) == images


def test_texts_are_counted_by_their_tokens() -> None:
    assert batch_size_for(torch.zeros(1, 32, dtype=torch.int64)) == 256
