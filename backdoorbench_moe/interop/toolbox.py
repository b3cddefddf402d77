"""Reading poisoned training sets of backdoor-toolbox, and refusing folders of TrojAI.

Source:
    backdoor-toolbox (Xie et al.): `poisoned_train_set/<data>/<attack>_<rate>.../`. TrojAI: `id-XXXXXXXX/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.errors import DataError
from backdoorbench_moe.interop.torch_file import read_torch_file

CHUNK = 4096


@dataclass(frozen=True)
class ToolboxSet:
    """A poisoned training set.

    Attributes:
        train: All training images and labels, after poisoning.
        poison: (n,) int64, indices of the poisoned images, ascending.
        cover: (c,) int64, indices of the cover images, ascending; empty if there are none.
    """

    train: Split
    poison: Tensor
    cover: Tensor


def read_toolbox_set(folder: Path | str) -> ToolboxSet:
    """Read the files `imgs`, `labels`, `poison_indices` and, if it exists, `cover_indices` of a folder.

    Args:
        folder: The folder of a poisoned training set.

    Raises:
        DataError: A file is missing or damaged, or has other content; the message names it.
    """
    root = Path(folder)
    images = read_torch_file(root / "imgs")
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or images.shape[1] != 3
        or not images.is_floating_point()
    ):
        raise DataError(f"{root / 'imgs'}: expected a tensor (N, 3, H, W) of floats")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise DataError(f"{root / 'imgs'}: expected pixels in [0, 1], got others, or NaN")
    labels = _numbers(root / "labels")
    if len(labels) != len(images) or (labels < 0).any():
        raise DataError(f"{root / 'labels'}: expected a label of at least 0 for each of {len(images)} images")
    cover = root / "cover_indices"
    return ToolboxSet(
        Split(_as_bytes(images), labels),
        _places(root / "poison_indices", len(images)),
        _places(cover, len(images)) if cover.exists() else torch.empty(0, dtype=torch.int64),
    )


def _as_bytes(images: Tensor) -> Tensor:
    """Round pixels in [0, 1] to 8 bits, in chunks."""
    return torch.cat([(part * 255).round().to(torch.uint8) for part in images.split(CHUNK)])


def _numbers(path: Path) -> Tensor:
    """Read a tensor or list of integers."""
    values = read_torch_file(path)
    if isinstance(values, list) and all(type(v) is int and abs(v) < 1 << 62 for v in values):
        values = torch.tensor(values, dtype=torch.int64)
    if not isinstance(values, Tensor) or values.dtype != torch.int64 or values.ndim != 1:
        raise DataError(f"{path}: expected whole numbers")
    return values


def _places(path: Path, images: int) -> Tensor:
    places = _numbers(path).unique()
    if len(places) and not 0 <= int(places[0]) <= int(places[-1]) < images:
        raise DataError(
            f"{path}: expected places in 0..{images - 1}, got {int(places[0])}..{int(places[-1])}"
        )
    return places


def refuse_trojai(folder: Path) -> None:
    """Raise DataError if a folder is from TrojAI, whose models are pickled modules: reading them runs code.

    Args:
        folder: The folder to import.
    """
    if (folder / "model.pt").exists() and (folder / "config.json").exists():
        raise DataError(
            f"{folder / 'model.pt'}: refused, as TrojAI stores a model as a whole pickled module, and reading one runs "
            "what is in it. Where you trust it, python -m backdoorbench_moe.interop.export_script prints a script that "
            "writes its weights as safetensors"
        )
