"""A tiny data set, and a spec that trains on it in a second."""

from __future__ import annotations

from torch import nn

from backdoorbench_moe.config import RunSpec, build_spec
from backdoorbench_moe.data.base import Dataset, ImageSet, Split
from backdoorbench_moe.testing.making import coloured_split

TINY_MODEL = {"name": "pmoe", "widen_factor": 1, "moe_channels": 8, "expert_channels": 4}


class Tiny(Dataset):
    """Three classes told apart by colour, with noise: 96 training and 60 test images of 32x32.

    Attributes:
        offset: Added to the seeds of the images. Tests change it for other data from the same code.
        names: The classes.
    """

    offset = 0
    names: tuple[str, ...] = ("red", "green", "blue")

    def __init__(
        self, *, salt: int = 0, train_images: int | None = None, test_images: int | None = None
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.salt = salt

    def read(self) -> ImageSet:
        """Draw the images."""
        return ImageSet("tiny", self._split(96, 1), self._split(60, 2), self.names)

    def _split(self, count: int, seed: int) -> Split:
        return coloured_split(count, seed + 10 * self.salt + self.offset)


def count_hits(model: nn.Module, split: Split) -> int:
    """Number of images of a small split that the model predicts as labelled."""
    return int((model.eval()(split.images.float() / 255).argmax(1) == split.labels).sum())


def tiny_spec(**values: object) -> RunSpec:
    """A spec on "tiny" with a very small pMoE; any key may be given."""
    base = {
        "recipe": "paper",
        "dataset": "tiny",
        "model": TINY_MODEL,
        "trigger": "square",
        "applicator": "image",
        "precision": "fp32",
        "poison": {"rate": 0.25},
        "train": {"epochs": 2, "batch_size": 32, "lr": 0.1},
    }
    return build_spec(base, values)
