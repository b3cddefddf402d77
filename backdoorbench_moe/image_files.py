"""Image files as 8-bit RGB images, read with Pillow; what has no exact 8-bit RGB form is refused."""

from __future__ import annotations

import functools
import re
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps

from backdoorbench_moe.errors import BbmoeWarning, DataError

# Tried first, in this order; most files are one of these.
COMMON = ("PNG", "JPEG", "PPM", "BMP", "WEBP", "GIF", "TIFF")
# EPS starts another program, WMF needs Windows, and of the others Pillow reads no pixels by itself.
NOT_READ = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "PDF", "PALM"})
# These become RGB without loss; those with transparency only if every pixel is opaque.
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA")
TIFF_BITS_PER_SAMPLE = 258
# A raw mode such as "RGB;16B" names 16 bits and their byte order; without an order ("BGR;16") it is 5, 6 and 5 bits.
DEEP_RAW_MODE = re.compile(r";16[BLN]$")
# Start of a JPEG 2000 codestream, then 36 bytes of sizes, then the number of components.
J2K_COMPONENTS = re.compile(rb"\xff\x4f\xff\x51.{36}(..)", re.DOTALL)
# AVIF's configuration box: bits 6 and 5 of its third byte say 10 and 12 bits.
AV1_FLAGS = re.compile(rb"av1C..(.)", re.DOTALL)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that this Pillow decodes, in lower case and with their dot."""
    suffixes = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in suffixes.items() if kind in _formats() or kind == "MPO")


def is_image(path: Path) -> bool:
    """Return whether a file's suffix, in any case, is one of an image that Pillow decodes."""
    return path.suffix.lower() in image_suffixes()


def read_image(path: Path) -> Image.Image:
    """Read one image file, of any suffix, as 8-bit RGB; see `decode`.

    Raises:
        DataError: The file is missing or damaged, or has no exact 8-bit RGB form.
    """
    image, more = decode(path)
    if more:
        warnings.warn(
            f"{path}: has several frames or pages; only the first is read", BbmoeWarning, stacklevel=2
        )
    return image


def decode(path: Path) -> tuple[Image.Image, bool]:
    """Decode one image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Grey and palette images become RGB, and opaque ones lose their alpha channel: neither changes a pixel. Images of
    more than 8 bits a channel, of other colour models (CMYK) and with transparent pixels are refused.

    Returns:
        The first frame, and whether the file has more of them (an animation, or a TIFF file of several pages).

    Raises:
        DataError: The file is missing or damaged, or has no exact 8-bit RGB form. The message names the file.
    """
    try:
        with Image.open(path, formats=_formats()) as file:
            bits = _bits_per_channel(file, path)
            # A PSD file's frames are its layers, and Pillow opens it at the flattened image.
            more = file.format != "PSD" and bool(getattr(file, "is_animated", False))
            file.load()
            image: Image.Image = file
            mode, clear = image.mode, image.has_transparency_data
            if bits <= 8 and mode in MODES:
                if clear:
                    image = image.convert("RGBA")
                    clear = image.getchannel("A").histogram()[255] < image.width * image.height
                if not clear:
                    _turn_upright(image)
                    return image if image.mode == "RGB" else image.convert("RGB"), more
    except Exception as error:  # A damaged file can fail in any way inside its decoder.
        raise DataError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error
    got = f"mode {mode}" + (f" of {bits} bits" if bits > 8 else "")
    got += " with transparent pixels" if bits <= 8 and mode in MODES else ""
    raise DataError(
        f"{path}: expected an RGB, grey or palette image of 8 bits a channel without transparency, got {got}"
    )


@functools.cache
def _formats() -> tuple[str, ...]:
    """Names of the formats to try; only those that have a suffix, since Pillow guesses the others from few bytes."""
    Image.init()
    named = set(Image.registered_extensions().values())
    others = sorted((named & set(Image.OPEN)) - NOT_READ - set(COMMON))
    return (*(name for name in COMMON if name in Image.OPEN), *others)


def _turn_upright(image: Image.Image) -> None:
    """Apply the EXIF orientation in place; without one, or with a damaged EXIF block, the image stays as stored."""
    # Pillow raises many kinds of errors over a damaged block, and no viewer refuses the pixels for it.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _bits_per_channel(file: Image.Image, path: Path) -> int:
    """Return the bits a channel as stored, where Pillow would cut them down to 8 without a word; otherwise 8."""
    if file.format == "TIFF":
        return max(file.tag_v2.get(TIFF_BITS_PER_SAMPLE, (8,)))  # type: ignore[attr-defined]
    if file.format == "JPEG2000":
        return _jpeg2000_bits(path.read_bytes())
    if file.format == "AVIF":
        flags = [found[1][0] for found in AV1_FLAGS.finditer(path.read_bytes())]
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
    # Three bytes a component; the first holds its sign and its bits less one.
    return max((depth & 0x7F) + 1 for depth in data[start : start + 3 * count : 3])
