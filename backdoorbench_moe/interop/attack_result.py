"""Reading BackdoorBench's result files: `attack_result.pt`, `defense_result.pt` and the lists next to them.

Source:
    BackdoorBench v2.2 (Wu et al., 2022), `utils/save_load_attack.py` and `utils/bd_dataset_v2.py`: the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.interop.torch_file import read_torch_file
from backdoorbench_moe.pickles import PickledArray

ATTACK, DEFENSE, INFO, POISON_LIST = (
    "attack_result.pt",
    "defense_result.pt",
    "info.pickle",
    "train_poison_index_list.pickle",
)
MOST_IMAGES, MOST_CLASSES, MOST_PIXELS = 20_000_000, 100_000, 4096
LONGEST_NAME = 200


@dataclass(frozen=True)
class StoredSplit:
    """The modified images of a training or test set that BackdoorBench stored.

    Attributes:
        indices: (M,) int64, their indices in the clean set, ascending.
        labels: (M,) int64, their new labels.
        true: (M,) int64, their labels in the clean set.
        images: Number of images of the clean set.
    """

    indices: np.ndarray
    labels: np.ndarray
    true: np.ndarray
    images: int

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class AttackResult:
    """The content of an `attack_result.pt`.

    Attributes:
        model: Name of the architecture, such as "preactresnet18".
        num_classes: Number of classes.
        weights: The state dict, with the names in the file.
        image_size: Height, width and channels of the images.
        dataset: Name of the data set, such as "cifar10".
        train: The modified training images; None if the file has none.
        test: The triggered test images.
    """

    model: str
    num_classes: int
    weights: Mapping[str, Tensor]
    image_size: tuple[int, int, int]
    dataset: str
    train: StoredSplit | None
    test: StoredSplit


@dataclass(frozen=True)
class DefenseResult:
    """The content of a `defense_result.pt`: architecture, number of classes and weights, as in `AttackResult`."""

    model: str
    num_classes: int
    weights: Mapping[str, Tensor]


def read_attack_result(path: Path) -> AttackResult:
    """Read an `attack_result.pt`. The paths in it are not used.

    Raises:
        DataError: The file is missing or damaged, or has other content; the message names the file.
    """
    fields = _Fields(path, "an attack_result.pt of BackdoorBench")
    size = fields.sequence("img_size", 3)
    if not all(type(side) is int and 1 <= side <= MOST_PIXELS for side in size):
        raise fields.fault("img_size", f"height, width and channels from 1 to {MOST_PIXELS}", size)
    train = fields.values.get("bd_train")
    return AttackResult(
        **fields.model(),
        image_size=(size[0], size[1], size[2]),
        dataset=fields.text("clean_data"),
        train=None if train is None else fields.split("bd_train"),
        test=fields.split("bd_test"),
    )


def read_defense_result(path: Path) -> DefenseResult:
    """Read a `defense_result.pt`; see `read_attack_result`."""
    return DefenseResult(**_Fields(path, "a defense_result.pt of BackdoorBench").model())


def read_info(path: Path) -> dict[str, str | int | float | bool]:
    """Read the settings of an attack from `info.pickle`: strings, numbers and booleans; others are ignored.

    Raises:
        DataError: The file is missing or damaged, or has other content; the message names the file.
    """
    values = _Fields(path, "an info.pickle of BackdoorBench").values
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool)}


def read_poison_list(path: Path) -> np.ndarray:
    """Read a `train_poison_index_list.pickle`: (N,) bool, which training images were modified.

    Raises:
        DataError: The file is missing or damaged, or has other content; the message names the file.
    """
    return _flags(read_torch_file(path), str(path), "train_poison_index_list")


class _Fields:
    """The fields of a file. Each is checked when it is accessed."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, values = path, read_torch_file(path)
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise DataError(f"{path}: expected {what}, a dict with names, got {type(values).__name__}")
        self.values: dict[str, Any] = values

    def fault(self, name: str, expected: str, got: object) -> DataError:
        return DataError(f"{self.path}: {name}: expected {expected}, got {_short(got)}")

    def of(self, name: str, kind: type, expected: str) -> Any:
        if name not in self.values:
            raise DataError(f"{self.path}: {name} is missing")
        value = self.values[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fault(name, expected, value)
        return value

    def text(self, name: str) -> str:
        text: str = self.of(name, str, "a name")
        if not text or len(text) > LONGEST_NAME or not text.isprintable():
            raise self.fault(name, f"a name of at most {LONGEST_NAME} letters", text)
        return text

    def sequence(self, name: str, length: int) -> tuple[Any, ...]:
        values = self.values.get(name)
        if not isinstance(values, list | tuple) or len(values) != length:
            raise self.fault(name, f"{length} values", values)
        return tuple(values)

    def model(self) -> dict[str, Any]:
        """Return architecture, number of classes and weights."""
        classes = self.of("num_classes", int, "a number of classes")
        if not 2 <= classes <= MOST_CLASSES:
            raise self.fault("num_classes", f"2 to {MOST_CLASSES}", classes)
        weights = self.of("model", dict, "a state dict")
        if not weights:
            raise self.fault("model", "a state dict with tensors", weights)
        for name, tensor in weights.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise self.fault(f"model: {_short(name)}", "a tensor", tensor)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DataError(f"{self.path}: model: {name}: holds NaN or infinite numbers")
        return {"model": self.text("model_name"), "num_classes": classes, "weights": dict(weights)}

    def split(self, name: str) -> StoredSplit:
        """Return a stored training or test set."""
        state = self.of(name, dict, "the images that were changed")
        container = state.get("bd_data_container")
        stored = container.get("data_dict") if isinstance(container, dict) else None
        if not isinstance(stored, dict):
            raise self.fault(f"{name}: bd_data_container: data_dict", "a dict by image", stored)
        flags = _flags(state.get("poison_indicator"), str(self.path), f"{name}: poison_indicator")
        kept = state.get("original_index_array")
        if not isinstance(kept, PickledArray) or kept.values.ndim != 1 or kept.values.dtype.kind not in "iu":
            raise self.fault(f"{name}: original_index_array", "an array of places", kept)
        places = kept.values.astype(np.int64)
        if len(places) > MOST_IMAGES or (len(places) and not 0 <= places.min() <= places.max() < len(flags)):
            raise self.fault(f"{name}: original_index_array", f"places in 0..{len(flags) - 1}", "others")
        wanted = sorted(set(places[flags[places]].tolist()))
        rows = [self._row(name, index, stored.get(index)) for index in wanted]
        labels, true = np.array(rows, np.int64).reshape(-1, 2).T.copy()
        return StoredSplit(np.array(wanted, np.int64), labels, true, len(flags))

    def _row(self, name: str, index: int, entry: object) -> tuple[int, int]:
        """Return the new and the true label of a stored image."""
        other = entry.get("other_info") if isinstance(entry, dict) else None
        if isinstance(other, list | tuple) and len(other) == 2:
            new, true = other
            if (
                type(new) is int
                and type(true) is int
                and 0 <= min(new, true) <= max(new, true) < MOST_CLASSES
            ):
                return new, true
        raise self.fault(f"{name}: image {index}", "its path, and its new and true label", entry)


def _flags(value: object, path: str, name: str) -> np.ndarray:
    """Check an array of 0 and 1, one for each image, and return it as bool."""
    if isinstance(value, PickledArray) and value.values.ndim == 1 and 0 < len(value.values) <= MOST_IMAGES:
        flags = value.values
        if np.isin(flags, (0, 1)).all():
            return flags.astype(bool)
    raise DataError(f"{path}: {name}: expected an array of 0 and 1, one for each image, got {_short(value)}")


def _short(value: object) -> str:
    """Format a value for messages; containers and arrays by their type."""
    return repr(value)[:80] if isinstance(value, str | int | float | None) else type(value).__name__
