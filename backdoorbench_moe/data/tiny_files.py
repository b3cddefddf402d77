"""Writing small data sets for tests, in the formats of published ones and as folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return random uint8 pixels."""
    return rng.integers(0, 256, shape, np.uint8)


def write_cifar10(root: Path) -> None:
    """Write CIFAR-10 in its binary format: for each image a label and 3072 pixel values, one byte each."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for file in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        labels = np.arange(10, dtype=np.uint8)[:, None]
        (folder / f"{file}.bin").write_bytes(np.hstack((labels, pixels(rng, 10, 3072))).tobytes())


def write_gtsrb(root: Path) -> None:
    """Write GTSRB as published: a folder with a table for each class, and one folder and table of test images."""
    rng = np.random.default_rng(0)
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"

    def put(folder: Path, csv: Path, labels: list[int]) -> None:
        folder.mkdir(parents=True)
        for index in range(len(labels)):
            Image.fromarray(pixels(rng, 20 + index, 25, 3)).save(folder / f"{index:05d}.ppm")
        rows = [f"{index:05d}.ppm;25;25;0;0;24;24;{label}" for index, label in enumerate(labels)]
        csv.write_text("\n".join([header, *rows]) + "\n")

    for label in (0, 14):
        folder = root / "GTSRB" / "Final_Training" / "Images" / f"{label:05d}"
        put(folder, folder / f"GT-{label:05d}.csv", [label] * 10)
    tests = root / "GTSRB" / "Final_Test" / "Images"
    put(tests, root / "GTSRB" / "GT-final_test.csv", [0, 14] * 4)


def write_folder(root: Path) -> None:
    """Write two class folders of images of different sizes."""
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (root / kind).mkdir()
        for index in range(20):
            Image.fromarray(pixels(rng, 24, 20 + index, 3)).save(root / kind / f"{index}.png")
