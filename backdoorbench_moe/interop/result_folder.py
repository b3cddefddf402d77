"""A result folder of BackdoorBench: its files, images and metrics."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from backdoorbench_moe.data.images import Form, read_images
from backdoorbench_moe.errors import DataError, UnknownNameError
from backdoorbench_moe.interop.attack_result import ATTACK, DEFENSE, StoredSplit

TRAIN_IMAGES, TEST_IMAGES = "bd_train_dataset", "bd_test_dataset"
SUFFIX = ".png"
# BackdoorBench's columns, which are fractions, by the metric's name in this package.
COLUMNS = {"ba": "test_acc", "asr": "test_asr", "ra": "test_ra"}
MOST_CSV_BYTES = 16 << 20


@dataclass(frozen=True)
class ResultFolder:
    """The folder of an attack, or of a defense against it.

    Attributes:
        path: The attack's folder, with `attack_result.pt` and the images.
        defense: Name of the defense, whose result is in the subfolder "defense"; None for the attack itself.
    """

    path: Path
    defense: str | None = None

    def check(self) -> None:
        """Check that the folder looks like a result.

        Raises:
            DataError: It does not.
        """
        expected = f"FOLDER {self.path}: expected a result folder of BackdoorBench, with {ATTACK}"
        if not self.path.is_dir():
            raise DataError(f"{expected}, but it {'is a file' if self.path.exists() else 'does not exist'}")
        if not (self.path / ATTACK).exists():
            raise DataError(f"{expected}, which is not found in it")
        if self.defense is not None and not self.weights_file.exists():
            known = sorted(path.name for path in (self.path / "defense").glob("*") if path.is_dir())
            raise UnknownNameError(
                "defense", self.defense, known, f"; with {DEFENSE} in {self.path / 'defense'}"
            )

    @property
    def weights_file(self) -> Path:
        """The file with the weights."""
        return self.path / ATTACK if self.defense is None else self._defense_folder / DEFENSE

    @property
    def _defense_folder(self) -> Path:
        assert self.defense is not None
        if Path(self.defense).name != self.defense or self.defense in (".", ".."):
            raise DataError(
                f"{self.path}: expected the name of a folder in it as defense, got {self.defense!r}"
            )
        return self.path / "defense" / self.defense

    def images(self, folder: str, split: StoredSplit, side: int) -> Tensor:
        """Read stored images. Their paths are derived from label and index only.

        Args:
            folder: `TRAIN_IMAGES` or `TEST_IMAGES`.
            split: The images to read.
            side: Expected height and width.

        Returns:
            (M, 3, side, side) uint8, in the order of `split`.

        Raises:
            DataError: An image is missing, not a PNG file, a link, or has another size; the message names it.
        """
        root = self.path / folder
        paths = [
            root / str(true) / f"{index}{SUFFIX}"
            for index, true in zip(split.indices.tolist(), split.true.tolist(), strict=True)
        ]
        for parent in {root, *(path.parent for path in paths)}:
            if parent.is_symlink():
                raise DataError(f"{parent}: expected a folder, got a link")
        for path in paths:
            _check_image(path, side)
        return (
            read_images(paths, Form(side, crop=False))
            if paths
            else torch.empty(0, 3, side, side, dtype=torch.uint8)
        )

    def own_numbers(self) -> tuple[dict[str, float], Path] | None:
        """Read the final metrics of BackdoorBench: BA, ASR and RA in percent, and the path of their file.

        Returns:
            None if there is no such file, or it has none of these columns.

        Raises:
            DataError: The file is damaged.
        """
        names = (
            ("attack_df.csv",)
            if self.defense is None
            else (f"{self.defense}_df.csv", f"{self.defense}_df_summary.csv")
        )
        folder = self.path if self.defense is None else self._defense_folder
        for path in (folder / name for name in names):
            if path.is_file() and (found := _last_row(path)):
                return found, path
        return None


def _check_image(path: Path, side: int) -> None:
    """Check the header of an image file before decoding, so that no large image is decoded."""
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{path}: " + ("expected a file, got a link" if path.is_symlink() else "not found"))
    try:
        with Image.open(path, formats=("PNG",)) as image:
            size = image.size
    except Exception as error:  # Pillow raises any kind of error for a damaged file.
        raise DataError(f"{path}: expected a PNG image ({type(error).__name__}: {error})") from None
    if size != (side, side):
        raise DataError(f"{path}: expected {side}x{side} pixels, got {size[0]}x{size[1]}")


def _last_row(path: Path) -> dict[str, float]:
    """Return the metrics in the last row of a CSV file that has any; a summary has other rows above it."""
    if path.stat().st_size > MOST_CSV_BYTES:
        raise DataError(
            f"{path}: expected a file of at most {MOST_CSV_BYTES} bytes, got {path.stat().st_size}"
        )
    found: dict[str, float] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = {name: _percent(row.get(column)) for name, column in COLUMNS.items()}
                known = {name: value for name, value in values.items() if value is not None}
                found = known or found
    except (csv.Error, UnicodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return found


def _percent(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return 100 * value if 0 <= value <= 1 else None
