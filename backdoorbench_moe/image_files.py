"""Reads image files with Pillow as 8-bit RGB. Images that cannot be converted exactly are rejected."""

from __future__ import annotations

import functools
import io
import re
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps

from backdoorbench_moe.errors import BbmoeWarning, DataError

# The most frequent formats, which are tried first, in this order.
COMMON = ("PNG", "JPEG", "PPM", "BMP", "WEBP", "GIF", "TIFF")
# EPS starts another program, WMF requires Windows, and Pillow cannot read the pixels of the others without plug-ins.
NOT_READ = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "PDF", "PALM"})
# Modes that can be converted to RGB exactly; those with an alpha channel only if every pixel is opaque.
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA")
# Further modes with 8 bits per channel, whose colours Pillow can only convert approximately.
INEXACT_MODES = ("CMYK", "YCbCr", "LAB", "HSV")
TIFF_BITS_PER_SAMPLE = 258
# A raw mode such as "RGB;16B" means 16 bits per channel, with the byte order. Without an order ("BGR;16") it means 16
# bits per pixel: 5, 6 and 5.
DEEP_RAW_MODE = re.compile(r";16[BLN]$")
# Start of a JPEG 2000 codestream, then 36 bytes of sizes, then the number of components.
J2K_COMPONENTS = re.compile(rb"\xff\x4f\xff\x51.{36}(..)", re.DOTALL)
# AVIF's configuration box: in its third byte, bit 6 is set for more than 8 bits, and bit 5 as well for 12 bits.
AV1_FLAGS = re.compile(rb"av1C..(.)", re.DOTALL)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that the installed Pillow can decode, in lower case, such as ".png"."""
    suffixes = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in suffixes.items() if kind in _formats() or kind == "MPO")


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of a format that Pillow can decode, in upper or lower case."""
    return path.suffix.lower() in image_suffixes()


def read_image(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB, see `decode`. Warn if it has several frames.

    Args:
        path: The file, with any suffix.

    Raises:
        DataError: The file is missing or damaged, or cannot be converted exactly.
    """
    image, more = decode(path)
    if more:
        warnings.warn(
            f"{path}: has several frames or pages; only the first is read", BbmoeWarning, stacklevel=2
        )
    return image


def decode(path: Path) -> tuple[Image.Image, bool]:
    """Decode an image file as 8-bit RGB, rotated according to its EXIF orientation.

    Grey and palette images are converted to RGB, and the alpha channel of opaque images is dropped, which changes no
    pixel. Images with more than 8 bits per channel, other colour models (CMYK) or transparent pixels are rejected.

    Args:
        path: The file, with any suffix.

    Returns:
        The first frame, and whether the file has others (an animation, or a TIFF file with several pages).

    Raises:
        DataError: The file is missing or damaged, or cannot be converted exactly. The message names the file.
    """
    return decode_content(read_content(path), path)


def read_content(path: Path) -> bytes:
    """Return the content of an image file. Raises DataError if it cannot be read; the message names the file."""
    try:
        if path.exists() and not path.is_file():
            # Opening a named pipe would block.
            raise DataError(f"{path}: expected an image file, got a folder, pipe or device")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image: {error.strerror or error}") from error


def decode_content(content: bytes, path: Path, *, convert: bool = False) -> tuple[Image.Image, bool]:
    """Decode the content of an image file; see `decode`.

    Args:
        content: The content.
        path: The file, for error messages.
        convert: Whether to let Pillow convert images with 8 bits per channel that cannot be converted exactly, such as
            CMYK images and those with transparent pixels.
    """
    try:
        with Image.open(_Content(content, path), formats=_formats()) as file:
            bits = _bits_per_channel(file, content)
            # A PSD file's frames are its layers, and Pillow opens it at the flattened image.
            more = file.format != "PSD" and bool(getattr(file, "is_animated", False))
            file.load()
            image: Image.Image = file
            mode, clear = image.mode, image.has_transparency_data
            if bits <= 8 and (mode in MODES or (convert and mode in INEXACT_MODES)):
                if clear and not convert:
                    image = image.convert("RGBA")
                    clear = image.getchannel("A").histogram()[255] < image.width * image.height
                if convert or not clear:
                    _turn_upright(image)
                    return image if image.mode == "RGB" else image.convert("RGB"), more
    except Exception as error:  # Decoders raise any kind of error for a damaged file.
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error
    got = f"mode {mode}" + (f" of {bits} bits" if bits > 8 else "")
    got += " with transparent pixels" if bits <= 8 and mode in MODES else ""
    raise DataError(
        f"{path}: expected an RGB, grey or palette image of 8 bits a channel without transparency, got {got}"
    )


class _Content(io.BytesIO):
    """The content of a file. Its `repr`, which Pillow uses in error messages, is the path."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __repr__(self) -> str:
        return repr(str(self.path))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the names of the formats to try. Formats without a registered suffix are left out."""
    Image.init()
    named = set(Image.registered_extensions().values())
    others = sorted((named & set(Image.OPEN)) - NOT_READ - set(COMMON))
    return (*(name for name in COMMON if name in Image.OPEN), *others)


def _turn_upright(image: Image.Image) -> None:
    """Rotate an image in place according to its EXIF orientation. A damaged EXIF block is ignored."""
    # Pillow raises many kinds of errors for a damaged block. Viewers show such images anyway.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _bits_per_channel(file: Image.Image, content: bytes) -> int:
    """Return the bits per channel in the file if Pillow would silently reduce them to 8; otherwise 8."""
    if file.format == "TIFF":
        return max(file.tag_v2.get(TIFF_BITS_PER_SAMPLE, (8,)))  # type: ignore[attr-defined]
    if file.format == "JPEG2000":
        return _jpeg2000_bits(content)
    if file.format == "AVIF":
        flags = [found[1][0] for found in AV1_FLAGS.finditer(content)]
        return max((12 if flag & 0x20 else 10 for flag in flags if flag & 0x40), default=8)
    for codec, _, _, arguments in getattr(file, "tile", ()):
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        raw_modes = [one for one in arguments if isinstance(one, str)]
        # BC6H, a texture format of DDS files, holds half-precision floats.
        if codec == "SGI16" or (codec == "bcn" and arguments[0] == 6):
            return 16
        if codec in ("ppm", "ppm_plain") and arguments[1] > 255:
            return int(arguments[1]).bit_length()
        if any(DEEP_RAW_MODE.search(raw_mode) for raw_mode in raw_modes):
            return 16
    return 8


def _jpeg2000_bits(data: bytes) -> int:
    found = J2K_COMPONENTS.search(data)
    if found is None:
        return 8
    count, start = int.from_bytes(found[1], "big"), found.end()
    # Each component has three bytes. The first holds the sign and the number of bits minus one.
    return max((depth & 0x7F) + 1 for depth in data[start : start + 3 * count : 3])
