"""Writing small data sets for tests, in the formats of published ones and as folders of images."""

from __future__ import annotations

import pickle
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


def write_cifar100(root: Path) -> None:
    """Write CIFAR-100 in its "python" format: a pickled dict for each split."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 40), ("test", 20)):
        fine = [int(label) for label in np.arange(count) % 100]
        content = {
            b"data": pixels(rng, count, 3072),
            b"fine_labels": fine,
            b"coarse_labels": [label % 20 for label in fine],
        }
        (folder / name).write_bytes(pickle.dumps(content, 2))


def write_tiny_imagenet(root: Path) -> None:
    """Write Tiny ImageNet: a folder for each class, and validation images with a table."""
    rng = np.random.default_rng(0)
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    synsets = {"n02124075": "Egyptian cat", "n01443537": "goldfish, Carassius auratus"}
    rows = []
    for synset in synsets:
        (folder / "train" / synset / "images").mkdir(parents=True)
        (folder / "train" / synset / f"{synset}_boxes.txt").touch()
        for index in range(12):
            image = Image.fromarray(pixels(rng, 64, 64, 3))
            image.save(folder / "train" / synset / "images" / f"{synset}_{index}.JPEG")
    for index in range(8):
        Image.fromarray(pixels(rng, 64, 64, 3)).save(folder / "val" / "images" / f"val_{index}.JPEG")
        rows.append(f"val_{index}.JPEG\t{list(synsets)[index % 2]}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("\n".join(synsets) + "\n")
    (folder / "words.txt").write_text("".join(f"{key}\t{words}\n" for key, words in synsets.items()))


def write_imagenet(root: Path) -> None:
    """Write the layout of ImageNet: a folder for each class in both splits, and a file of names."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for synset in ("n01440764", "n02979186"):
            (root / split / synset).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(pixels(rng, 40 + index, 50, 3))
                image.save(root / split / synset / f"{synset}_{index}.JPEG")
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn02979186 cassette player\n")
