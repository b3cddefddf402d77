"""The conformance test of memory fails for a data set whose test images are a view of its training images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backdoorbench_moe import data
from backdoorbench_moe.data.base import Dataset, ImageSet, Split
from backdoorbench_moe.testing import test_datasets


class Apart(Dataset):
    """Eight images, of which the last four are the test images."""

    first_of_test = 4

    def read(self) -> ImageSet:
        images = torch.arange(8, dtype=torch.uint8).repeat_interleave(12).view(8, 3, 2, 2)
        labels = torch.arange(8) % 2
        train, test = Split(images[:4], labels[:4]), slice(self.first_of_test, None)
        return ImageSet("own", train, Split(images[test], labels[test]), ("even", "odd"))


class Overlapping(Apart):
    """The last training image is a test image."""

    first_of_test = 3


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    """Run the test over a data set."""

    def run(part: type[Dataset]) -> None:
        monkeypatch.setitem(data.registry._local, part.__name__, part)
        test_datasets.test_the_splits_share_no_memory(part.__name__, Path())

    return run


def test_splits_that_lie_side_by_side_pass(check) -> None:
    check(Apart)


def test_splits_with_an_image_in_common_fail(check) -> None:
    with pytest.raises(AssertionError, match="in the memory of a training one"):
        check(Overlapping)
