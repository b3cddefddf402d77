"""Write the kinds of signs that the data set `signs` has as a folder of large PNG files, for `folder` to read.

    python benchmarks/larger_images.py DIR [--side 224] [--train-images 2000] [--test-images 500]
    bbmoe bench run larger-images --data-root DIR

They are drawn at this size, not resized, and are the same on every machine. DIR/train/<class>/*.png and
DIR/test/<class>/*.png; DIR must not be there yet, and is there only when complete.
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
    parser.add_argument("--side", type=int, default=224, metavar="PIXELS", help="of a picture [224]")
    parser.add_argument("--train-images", type=int, default=2000, metavar="N", help="[2000]")
    parser.add_argument("--test-images", type=int, default=500, metavar="N", help="[500]")
    given = parser.parse_args()
    try:
        write_folder(given.folder, given.side, train=given.train_images, test=given.test_images)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {given.train_images} training and {given.test_images} test images to {given.folder}")


def write_folder(folder: Path, side: int, *, train: int, test: int) -> None:
    """Write both splits. Raises ConfigError for a folder that is there, and for numbers that do not go."""
    if folder.exists():
        raise ConfigError.expected("DIR", "a folder that is not there yet", str(folder))
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
    """One folder a class; a picture's file name is its number."""
    split = draw_split(stream, count, side=side)
    for sign in SIGNS:
        (folder / sign.name).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        picture.save(folder / SIGNS[label].name / f"{number:05d}.png", compress_level=1)


if __name__ == "__main__":
    main()
