"""The GTSRB data set: the German Traffic Sign Recognition Benchmark."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.data.decoded import Files, read_split, with_digest
from backdoorbench_moe.data.images import Form, check_image_size
from backdoorbench_moe.data.listing import is_hidden, list_folder
from backdoorbench_moe.data.roots import data_root, missing
from backdoorbench_moe.errors import BbmoeWarning, DataError
from backdoorbench_moe.image_files import is_image

TEST_CSV = "GT-final_test.csv"
PAPER_TRAIN_IMAGES = 39_209
CLASSES = (
    *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no overtaking",
    "no overtaking for lorries",
    "priority at next crossing",
    "priority road",
    "give way",
    "stop",
    "no vehicles",
    "no lorries",
    "no entry",
    "danger",
    "bend to the left",
    "bend to the right",
    "double bend",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights ahead",
    "pedestrians",
    "children",
    "bicycles",
    "ice or snow",
    "wild animals",
    "end of all limits",
    "turn right",
    "turn left",
    "ahead only",
    "ahead or right",
    "ahead or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking for lorries",
)


class GTSRB(Dataset):
    """GTSRB: 43 classes, 39,209 training and 12,630 test images.

    The published folders are `Final_Training/Images/000CC` for each class, with its images and the table
    `GT-000CC.csv`, and `Final_Test/Images`. The table of the test images, `GT-final_test.csv`, can be in the folder of
    the test images, in one of its parents, or next to the folder GTSRB. A table must list every image of its folder
    exactly once, and no others. Subsets of images or classes are accepted.

    The folders of torchvision (`Training/000CC`) come from another archive with 26,640 training images, which papers do
    not use. They are read with a warning.

    Decoded images are cached on disk, see `data.decoded`.

    Args:
        root: The folder GTSRB, or a folder that contains it. By default the environment variable BBMOE_DATA, or
            ~/.cache/backdoorbench_moe if that is not set.
        image_size: Side of the images in pixels, 1 to 8192. The full image, not its region of interest, is resized to
            this size (bilinear, antialiased); the aspect ratio is not kept.
        train_images: Number of training images to keep, from 1; all if None. See `Dataset`.
        test_images: Number of test images to keep, from 1; all if None. See `Dataset`.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Stallkamp et al., "Man vs. computer", Neural Networks 32 (2012).
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        image_size: int = 32,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.root, self.image_size = root, check_image_size(image_size)

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small data set for the conformance tests; see `Dataset.write_tiny`."""
        from backdoorbench_moe.data.tiny_files import write_gtsrb

        write_gtsrb(folder)
        return {"root": str(folder)}

    def source(self) -> Path | None:
        """Return the folder that contains the training and test images; None if there is none."""
        try:
            return _find(data_root(self.root))
        except DataError:
            return None

    def files_beside(self) -> tuple[Path, ...]:
        """Return the table of the test images if it is outside `source`, as after unpacking the three archives."""
        base = self.source()
        table = None if base is None else _find_test_table(base)
        return () if base is None or table is None or table.is_relative_to(base) else (table,)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the 43 classes; no file is read."""
        return CLASSES

    def read(self) -> ImageSet:
        """Read both splits.

        Raises:
            DataError: Files are missing, damaged or inconsistent with their tables; the message names the file.
        """
        base = _find(data_root(self.root))
        published = base / "Final_Training" / "Images"
        if published.is_dir():
            train = [
                pair for folder, label in _class_folders(published) for pair in _class_rows(folder, label)
            ]
        else:
            train = _torchvision_files(base / "Training")
        test = _test_files(base)
        form = Form(self.image_size, crop=False)
        return with_digest(
            ImageSet(
                "gtsrb",
                read_split(train, form, self.train_images, "train_images"),
                read_split(test, form, self.test_images, "test_images"),
                CLASSES,
            )
        )


def _find(root: Path) -> Path:
    """Return the folder that contains the training and test images, at or below `root`."""
    for base in (root, root / "GTSRB", root / "gtsrb" / "GTSRB"):
        if (base / "Final_Training" / "Images").is_dir() or (base / "Training").is_dir():
            return base
    raise missing("gtsrb", root, "GTSRB/Final_Training/Images, gtsrb/GTSRB/Training", "")


def _class_folders(folder: Path) -> list[tuple[Path, int]]:
    names = {f"{label:05d}": label for label in range(len(CLASSES))}
    folders = [path for path in list_folder(folder)[0] if not is_hidden(path)]
    for path in folders:
        if path.name not in names:
            raise DataError(f"{path}: expected class folders 00000 to {len(CLASSES) - 1:05d}")
    return [(path, names[path.name]) for path in folders]


def _class_rows(folder: Path, label: int) -> Files:
    table = folder / f"GT-{folder.name}.csv"
    files = _read_rows(table, folder)
    for path, given in files:
        if given != label:
            raise DataError(f"{table}: {path.name}: expected ClassId {label} as its folder says, got {given}")
    return files


def _torchvision_files(folder: Path) -> Files:
    files = [(path, label) for sub, label in _class_folders(folder) for path in _images(sub)]
    warnings.warn(
        f"gtsrb: {folder} is torchvision's layout with {len(files):,} training images; the published set, "
        f"and the paper's, has {PAPER_TRAIN_IMAGES:,} in Final_Training/Images",
        BbmoeWarning,
        stacklevel=2,
    )
    return files


def _test_files(base: Path) -> Files:
    table = _find_test_table(base)
    if table is None:
        first, *others = _table_folders(base)
        raise DataError(f"{first / TEST_CSV}: is missing (also looked in {', '.join(map(str, others))})")
    return _read_rows(table, base / "Final_Test" / "Images")


def _table_folders(base: Path) -> tuple[Path, ...]:
    """The folders that are searched for the table of the test images, in this order."""
    return base, base / "Final_Test", base / "Final_Test" / "Images", base.parent


def _find_test_table(base: Path) -> Path | None:
    return next((path for folder in _table_folders(base) if (path := folder / TEST_CSV).is_file()), None)


def _read_rows(table: Path, folder: Path) -> Files:
    """Read the labels of the images in a folder from a table with columns separated by ";".

    Raises:
        DataError: The table is missing or damaged, or does not list every image of the folder exactly once.
    """
    rows = _parse_rows(table)
    there = {path.name for path in _images(folder)}
    lines: dict[str, int] = {}
    for name, label, line in rows:
        if name not in there:
            raise DataError(f"{folder / str(name)}: is missing, but {table.name} names it")
        if name in lines:
            raise DataError(
                f"{table}: line {line}: names {name} again, which line {lines[name]} names already"
            )
        lines[name] = line
        if not (label or "").isdecimal() or len(label) > 5 or int(label) >= len(CLASSES):
            raise DataError(f"{table}: {name}: expected a ClassId in 0..{len(CLASSES) - 1}, got {label!r}")
    if unnamed := there.difference(lines):
        raise DataError(f"{table}: has no row for {len(unnamed)} images, such as {min(unnamed)}")
    return [(folder / name, int(label)) for name, label, _ in rows]


def _images(folder: Path) -> list[Path]:
    """Return the images of a folder, sorted by name."""
    return [path for path in list_folder(folder)[1] if is_image(path) and not is_hidden(path)]


def _parse_rows(table: Path) -> list[tuple[str, str, int]]:
    """Return the file name, the label and the line number of every row of a table."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=";")
            return [(row["Filename"], row["ClassId"], reader.line_num) for row in reader]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: is missing") from error
    except KeyError as error:
        raise DataError(f"{table}: expected the columns Filename and ClassId, found no {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error})") from error
