"""The Tiny ImageNet data set."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.data.decoded import Files, read_split, with_digest
from backdoorbench_moe.data.images import Form, check_image_size
from backdoorbench_moe.data.listing import LeftOut, find_images
from backdoorbench_moe.data.roots import data_root, missing
from backdoorbench_moe.data.synsets import list_classes, name_synsets, read_lines
from backdoorbench_moe.errors import DataError

FOLDER = "tiny-imagenet-200"
CLASSES, WORDS, ANNOTATIONS = "wnids.txt", "words.txt", "val_annotations.txt"


class TinyImageNet(Dataset):
    """Tiny ImageNet: 200 classes, 100,000 training and 10,000 test images of 64x64 pixels.

    The test images are those of `val`, since the labels of `test` are not published. The classes are the synsets in
    `wnids.txt`, in alphabetical order, as in torchvision's `ImageFolder`; `words.txt` has their names. Subsets of
    classes or images are accepted. Decoded images are cached on disk, see `data.decoded`.

    Args:
        root: The folder tiny-imagenet-200, or a folder that contains it. By default the environment variable
            BBMOE_DATA, or ~/.cache/backdoorbench_moe if that is not set.
        image_size: Side of the images in pixels, 1 to 8192. Other sizes than 64 are resized (bilinear, antialiased).
        train_images: Number of training images to keep, from 1; all if None. See `Dataset`.
        test_images: Number of test images to keep, from 1; all if None. See `Dataset`.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Le and Yang, "Tiny ImageNet Visual Recognition Challenge", Stanford CS 231N, 2015.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        image_size: int = 64,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.root, self.image_size = root, check_image_size(image_size)

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small data set for the conformance tests; see `Dataset.write_tiny`."""
        from backdoorbench_moe.data.tiny_files import write_tiny_imagenet

        write_tiny_imagenet(folder)
        return {"root": str(folder)}

    def source(self) -> Path | None:
        """Return the folder that is read; None if there is none."""
        return _find(data_root(self.root))

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, by number, without reading images."""
        folder = self._folder()
        return name_synsets(_synsets(folder), [folder / WORDS])

    def read(self) -> ImageSet:
        """List the files and decode those that are kept.

        Raises:
            DataError: Files are missing, damaged or inconsistent with each other; the message names the file.
        """
        folder, left_out = self._folder(), LeftOut()
        synsets, form = _synsets(folder), Form(self.image_size, crop=True, convert=True)
        train = list_classes(folder / "train", synsets, folder, left_out)
        test = _annotated(folder, synsets)
        return with_digest(
            ImageSet(
                "tiny-imagenet",
                read_split(train, form, self.train_images, "train_images"),
                read_split(test, form, self.test_images, "test_images"),
                name_synsets(synsets, [folder / WORDS]),
            )
        )

    def _folder(self) -> Path:
        root = data_root(self.root)
        folder = _find(root)
        if folder is None:
            raise missing("tiny-imagenet", root, f"{FOLDER}, {CLASSES}", "")
        return folder


def _find(root: Path) -> Path | None:
    return next((folder for folder in (root, root / FOLDER) if (folder / CLASSES).is_file()), None)


def _synsets(folder: Path) -> list[str]:
    """Return the classes, sorted. Raises DataError if the table is damaged or inconsistent with the folders."""
    table = folder / CLASSES
    synsets = read_lines(table)
    if not synsets or len(set(synsets)) < len(synsets) or any(set(line) & set("/\t ") for line in synsets):
        raise DataError(f"{table}: expected one synset (n01443537) on each line, each of them once")
    for synset in synsets:
        if not (folder / "train" / synset).is_dir():
            raise DataError(f"{folder / 'train' / synset}: is missing, but {CLASSES} names it")
    return sorted(synsets)


def _annotated(folder: Path, synsets: list[str]) -> Files:
    """List the validation images with the classes that their table gives them.

    Raises:
        DataError: The table is damaged, or does not list every image exactly once.
    """
    table, images = folder / "val" / ANNOTATIONS, folder / "val" / "images"
    labels = {synset: label for label, synset in enumerate(synsets)}
    there = {path.name: path for path in find_images(images, folder, LeftOut())} if images.is_dir() else {}
    files: dict[str, int] = {}
    for line in read_lines(table):
        name, synset, *_ = [*line.split("\t"), ""]
        if synset not in labels:
            raise DataError(f"{table}: {name}: expected a synset of {CLASSES}, got {synset!r}")
        if name not in there:
            raise DataError(f"{images / name}: is missing, but {ANNOTATIONS} names it")
        if name in files:
            raise DataError(f"{table}: names {name} twice")
        files[name] = labels[synset]
    if unnamed := there.keys() - files.keys():
        raise DataError(f"{table}: has no line for {len(unnamed)} images, such as {min(unnamed)}")
    return [(there[name], label) for name, label in sorted(files.items())]
