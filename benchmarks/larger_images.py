"""Write the kinds of signs in the data set `signs` as a folder of large PNG files, for the data set `folder`.

    python benchmarks/larger_images.py DIR [--side 224] [--train-images 2000] [--test-images 500]
    bbmoe bench run larger-images --data-root DIR

The images are drawn at this size, not resized, and are identical on every machine. They are written to
DIR/train/<class>/*.png and DIR/test/<class>/*.png. DIR must not exist; it is created only when it is complete.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

from backdoorbench_moe.data.signs import SIGNS, draw_split
from backdoorbench_moe.errors import ConfigError


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--side", type=int, default=224, metavar="PIXELS", help="height and width of the images [224]"
    )
    parser.add_argument(
        "--train-images", type=int, default=2000, metavar="N", help="number of training images [2000]"
    )
    parser.add_argument(
        "--test-images", type=int, default=500, metavar="N", help="number of test images [500]"
    )
    given = parser.parse_args()
    try:
        write_folder(given.folder, given.side, train=given.train_images, test=given.test_images)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {given.train_images} training and {given.test_images} test images to {given.folder}")


def write_folder(folder: Path, side: int, *, train: int, test: int) -> None:
    """Write both splits. Raises ConfigError if the folder exists or a number is invalid."""
    if folder.exists():
        raise ConfigError.expected("DIR", "a folder that does not exist", str(folder))
    if not 8 <= side <= 1024:
        raise ConfigError.expected("--side", "8 to 1024 pixels", side)
    for name, count in (("--train-images", train), ("--test-images", test)):
        if count < len(SIGNS) or count % len(SIGNS):
            raise ConfigError.expected(name, f"a positive multiple of the {len(SIGNS)} kinds", count)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        for stream, (part, count) in enumerate((("train", train), ("test", test))):
            write_split(Path(partial) / "all" / part, stream, count, side)
        (Path(partial) / "all").rename(folder)


def write_split(folder: Path, stream: int, count: int, side: int) -> None:
    """Write one folder per class; the file name of an image is its number."""
    split = draw_split(stream, count, side=side)
    for sign in SIGNS:
        (folder / sign.name).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        picture.save(folder / SIGNS[label].name / f"{number:05d}.png", compress_level=1)


if __name__ == "__main__":
    main()
