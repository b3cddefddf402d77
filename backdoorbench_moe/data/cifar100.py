"""The CIFAR-100 data set, in its "python" version."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.data.cifar_files import SIDE, parse_pickle, read_file, read_members, split_of
from backdoorbench_moe.data.images import check_image_size, subset_and_resize
from backdoorbench_moe.data.roots import data_root, download, missing
from backdoorbench_moe.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FOLDER, ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"
TRAIN, TEST = "train", "test"
# The published file of the training images is 155 MB.
MAX_MEMBER_BYTES = 256 << 20
FINE = (
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle"),
    *("bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle"),
    *("chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur"),
    *("dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard"),
    *("lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle"),
    *("mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear"),
    *("pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon"),
    *("ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail"),
    *("snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone"),
    *("television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale"),
    *("willow_tree", "wolf", "woman", "worm"),
)
COARSE = (
    *("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables"),
    *("household_electrical_devices", "household_furniture", "insects", "large_carnivores"),
    *("large_man-made_outdoor_things", "large_natural_outdoor_scenes", "large_omnivores_and_herbivores"),
    *("medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees"),
    *("vehicles_1", "vehicles_2"),
)


class CIFAR100(Dataset):
    """CIFAR-100: 100 classes in 20 groups, 50,000 training and 10,000 test images of 32x32 pixels.

    The archive is read without being unpacked. Files with fewer images are accepted.

    Args:
        root: The folder or archive of the "python" version, or a folder that contains it. By default the environment
            variable BBMOE_DATA, or ~/.cache/backdoorbench_moe if that is not set.
        download: Whether to download the published archive into `root` if nothing is found there. Its MD5 is checked.
        labels: "fine" for the 100 classes, "coarse" for their 20 groups.
        image_size: Side of the images in pixels, 1 to 8192. Other sizes than 32 are resized (bilinear, antialiased).
        train_images: Number of training images to keep, from 1; all if None. See `Dataset`.
        test_images: Number of test images to keep, from 1; all if None. See `Dataset`.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        download: bool = False,
        labels: Literal["fine", "coarse"] = "fine",
        image_size: int = SIDE,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.root, self.download, self.labels = root, download, labels
        self.image_size = check_image_size(image_size)

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small data set for the conformance tests; see `Dataset.write_tiny`."""
        from backdoorbench_moe.data.tiny_files import write_cifar100

        write_cifar100(folder)
        return {"root": str(folder)}

    def source(self) -> Path | None:
        """Return the folder or archive that is read; None if there is none."""
        return _find(data_root(self.root))

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes; no file is read."""
        return FINE if self.labels == "fine" else COARSE

    def read(self) -> ImageSet:
        """Read the two files.

        Raises:
            DataError: Files are missing or damaged, or cannot be downloaded; the message names the file.
        """
        root = data_root(self.root)
        source = _find(root)
        if source is None and self.download:
            source = download(URL, root, MD5)
        if source is None:
            hint = ", or fetch it with --download (download=True)"
            raise missing("cifar100", root, f"{FOLDER}, {ARCHIVE}", hint)
        classes = self.class_names()
        splits = {
            name: split_of([parse_pickle(data, where, labels=f"{self.labels}_labels", classes=len(classes))])
            for name, data, where in _contents(source)
        }
        for name in (TRAIN, TEST):
            if name not in splits:
                raise DataError(f"{source}: {name} is missing")
        return ImageSet(
            "cifar100",
            subset_and_resize(splits[TRAIN], self.train_images, "train_images", self.image_size),
            subset_and_resize(splits[TEST], self.test_images, "test_images", self.image_size),
            classes,
        )


def _find(root: Path) -> Path | None:
    """Return the folder or archive to read, which is `root` or in `root`; None if there is none."""
    if root.is_file() or ((root / TRAIN).is_file() and (root / TEST).is_file()):
        return root
    if (root / FOLDER).is_dir():
        return root / FOLDER
    return root / ARCHIVE if (root / ARCHIVE).is_file() else None


def _contents(source: Path) -> list[tuple[str, bytes, str]]:
    """Return name, content, and name for error messages of each file found."""
    if source.is_dir():
        found = [(name, source / name) for name in (TRAIN, TEST) if (source / name).is_file()]
        return [(name, read_file(path), str(path)) for name, path in found]
    wanted = {f"{FOLDER}/{name}": name for name in (TRAIN, TEST)}
    return list(read_members(source, wanted, limit=MAX_MEMBER_BYTES, what="CIFAR-100"))
