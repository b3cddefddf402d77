"""Image files: what is taken, what is refused, and that no file is cut down without a word."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorbench_moe.data.images import Form, read_images
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError
from backdoorbench_moe.image_files import decode, image_suffixes, is_image, read_image
from backdoorbench_moe.triggers.picture import read_picture

SIDE = 16


def noise(side: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(pixels)


def png(bits: int, colour: int, channels: int) -> bytes:
    """A black PNG file of 4x4 pixels, written by hand: Pillow cannot write 48 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, bits, colour, 0, 0, 0)
    row = b"\0" + b"\xff" * (4 * channels * bits // 8)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * 4)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(bits: int, order: str) -> bytes:
    """An uncompressed RGB TIFF file of 2x2 white pixels, in one strip."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    data = b"\xff" * (2 * 2 * 3 * bits // 8)
    # Tag, type (3 is uint16, 4 uint32), count, value; BitsPerSample has three values, which stand behind the table.
    size = (1 + 8) * 12 + 2 + 4
    place = 8 + size - 12
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, 3, place),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, place + 6),
        (277, 3, 1, 3),
        (279, 4, 1, len(data)),
    ]
    table = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        packed = struct.pack(f"{order}I", value)
        if kind == 3 and count == 1:
            packed = struct.pack(f"{order}HH", value, 0)
        table += struct.pack(f"{order}HHI", tag, kind, count) + packed
    table += struct.pack(f"{order}I", 0)
    assert 8 + len(table) == place
    return mark + struct.pack(f"{order}I", 8) + table + struct.pack(f"{order}HHH", bits, bits, bits) + data


def saved(path: Path, **options: object) -> bytes:
    noise().save(path, **options)  # type: ignore[arg-type]
    return path.read_bytes()


def jpeg2000(path: Path, bits: int) -> bytes:
    """Pillow's file with another number of bits in its header."""
    data = bytearray(saved(path))
    first = data.index(b"\xff\x4f\xff\x51") + 42
    for component in range(3):
        data[first + 3 * component] = bits - 1
    return bytes(data)


def avif(path: Path, flags: int) -> bytes:
    data = bytearray(saved(path))
    place = data.index(b"av1C") + 6
    data[place] = data[place] & 0x9F | flags
    # libavif refuses a file whose list of bits a channel says another number.
    place = data.index(b"pixi") + 8
    data[place + 1 : place + 1 + data[place]] = bytes([12 if flags & 0x20 else 10] * data[place])
    return bytes(data)


Write = Callable[[Path], bytes]
# Suffix, how a file of more than 8 bits is written, its bits, and one of 8 bits of the same kind.
DEEP: list[tuple[str, Write, int, Write]] = [
    (".png", lambda path: png(16, 0, 1), 16, lambda path: png(8, 0, 1)),
    (".png", lambda path: png(16, 2, 3), 16, lambda path: png(8, 2, 3)),
    (".png", lambda path: png(16, 4, 2), 16, lambda path: png(8, 4, 2)),
    (".png", lambda path: png(16, 6, 4), 16, lambda path: png(8, 6, 4)),
    (".ppm", lambda path: b"P6 2 2 65535\n" + bytes(24), 16, lambda path: b"P6 2 2 255\n" + bytes(12)),
    (".ppm", lambda path: b"P6 2 2 1023\n" + bytes(24), 10, lambda path: b"P6 2 2 100\n" + bytes(12)),
    (".ppm", lambda path: b"P3 2 2 256\n" + b"9 " * 12, 9, lambda path: b"P3 2 2 255\n" + b"9 " * 12),
    (".pgm", lambda path: b"P5 2 2 65535\n" + bytes(8), 16, lambda path: b"P5 2 2 255\n" + bytes(4)),
    (".tif", lambda path: tiff(16, "<"), 16, lambda path: tiff(8, "<")),
    (".tif", lambda path: tiff(16, ">"), 16, lambda path: tiff(8, ">")),
    (".sgi", lambda path: saved(path, bpc=2), 16, lambda path: saved(path, bpc=1)),
    (".jp2", lambda path: jpeg2000(path, 12), 12, lambda path: saved(path)),
    (".avif", lambda path: avif(path, 0x40), 10, lambda path: saved(path)),
    (".avif", lambda path: avif(path, 0x60), 12, lambda path: saved(path)),
]


@pytest.mark.parametrize(("suffix", "deep", "bits", "plain"), DEEP)
def test_more_than_8_bits_are_refused_in_every_format_and_place(tmp_path, suffix, deep, bits, plain) -> None:
    path = tmp_path / f"deep{suffix}"
    if not is_image(path):
        pytest.skip(f"this Pillow does not decode {suffix}")
    path.write_bytes(plain(path))
    assert read_image(path).mode == "RGB"
    path.write_bytes(deep(path))
    message = rf"deep{suffix}: expected .* of 8 bits a channel .*, got mode .* of {bits} bits"
    for read in (read_image, lambda path: read_images([path], Form(2, crop=True))):
        with pytest.raises(DataError, match=message):
            read(path)
    with pytest.raises(ConfigError, match=f"blend: image: .*{message}"):
        read_picture(str(path))


EXACT = (
    ".png",
    ".bmp",
    ".dib",
    ".ppm",
    ".tif",
    ".tga",
    ".pcx",
    ".sgi",
    ".qoi",
    ".dds",
    ".ico",
    ".apng",
)
LOSSY = (".jpg", ".jfif", ".jpe", ".jp2", ".webp", ".avif", ".gif", ".mpo")


@pytest.mark.parametrize("suffix", [*EXACT, *LOSSY, ".xbm", ".pbm", ".pgm", ".icns"])
def test_what_pillow_writes_is_read(tmp_path, suffix) -> None:
    path = tmp_path / f"IMAGE{suffix.upper()}"
    if not is_image(path):
        pytest.skip(f"this Pillow does not decode {suffix}")
    picture = noise()
    if suffix in (".xbm", ".pbm", ".pgm"):
        picture = picture.convert("L" if suffix == ".pgm" else "1")
    picture.save(path)
    image, more = decode(path)
    assert image.mode == "RGB" and not more
    if suffix in EXACT:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))


def test_what_starts_other_programs_or_is_no_image_is_not_read() -> None:
    assert not image_suffixes() & {".eps", ".ps", ".wmf", ".emf", ".pdf", ".mpg", ".h5", ".txt", ""}
    assert {".png", ".jpeg", ".gif", ".tif", ".tiff", ".webp", ".pgm"} <= image_suffixes()


# What a viewer does to the stored rows and columns, as the EXIF standard (CIPA DC-008, Orientation) has it.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_upright(tmp_path, suffix, orientation) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8], stored[:8, 24:] = 255, 128  # Two corners tell all eight apart.
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(stored).save(path, exif=exif, lossless=True, quality=95)
    expected = TURNS[orientation](stored)
    np.testing.assert_allclose(np.asarray(read_image(path)).astype(int), expected, atol=8)
    picture = read_picture(str(path))[0].permute(1, 2, 0) * 255
    torch.testing.assert_close(picture, torch.tensor(expected.copy()).float(), atol=8, rtol=0)
    side = read_images([path], Form(16, crop=False))
    assert side.shape == (1, 3, 16, 16) and side[0, 0, 1, 1] == pytest.approx(expected[1, 1, 0], abs=12)


@pytest.mark.parametrize("block", [b"", b"garbage" * 9, b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\xff"])
def test_a_damaged_exif_block_leaves_the_image_as_it_is_stored(tmp_path, block) -> None:
    noise().save(tmp_path / "plain.png")
    noise().save(tmp_path / "damaged.png", exif=b"Exif\0\0" + block)
    plain, damaged = (np.asarray(read_image(tmp_path / f"{name}.png")) for name in ("plain", "damaged"))
    np.testing.assert_array_equal(damaged, plain)


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".png", ".webp", ".mpo", ".avif"])
def test_of_several_frames_the_first_is_read_and_it_is_said(tmp_path, suffix) -> None:
    path = tmp_path / f"frames{suffix}"
    if not is_image(path):
        pytest.skip(f"this Pillow does not decode {suffix}")
    frames = [Image.new("RGB", (SIDE, SIDE), (red, 0, 0)) for red in (200, 100, 0)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.warns(BbmoeWarning, match=rf"frames{suffix}: has several frames or pages; only the first"):
        image = read_image(path)
    assert image.getpixel((3, 3))[0] == pytest.approx(200, abs=4)  # type: ignore[index]
    with pytest.warns(BbmoeWarning, match=rf"2 files have several frames or pages, such as .*frames{suffix}"):
        read_images([path, path], Form(SIDE, crop=False))


def test_the_layers_of_a_psd_file_are_no_frames(tmp_path) -> None:
    """What Pillow calls its frames are the layers; it opens the file at the flattened image."""
    layer = struct.pack(">iiiiH4s4s4sI", 0, 0, 2, 2, 0, b"8BIM", b"norm", b"\xff\0\0\0", 0)
    layers = struct.pack(">h", 2) + 2 * layer
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 2, 2, 8, 3)
    flattened = b"\0\0" + bytes([200] * 4 + [100] * 4 + [0] * 4)
    blocks = struct.pack(">II", 0, 0) + struct.pack(">II", 4 + len(layers), len(layers)) + layers
    path = tmp_path / "layers.psd"
    path.write_bytes(header + blocks + flattened)
    with Image.open(path) as file:
        assert file.n_frames == 2  # type: ignore[attr-defined]
    image, more = decode(path)
    assert not more and image.getpixel((1, 1)) == (200, 100, 0)


def test_all_refused_files_are_counted_and_the_first_is_named(tmp_path) -> None:
    paths = [tmp_path / f"{number:03d}.png" for number in range(130)]
    for number, path in enumerate(paths):
        path.write_bytes(png(16, 2, 3) if number in (70, 71, 129) else png(8, 2, 3))
    with pytest.raises(
        DataError, match=r"070\.png: expected .* 16 bits; 2 more of 130 files are refused, too"
    ):
        read_images(paths, Form(4, crop=False))


def test_a_named_pipe_or_folder_called_like_an_image_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(DataError, match=f"{name}: expected an image file, got a folder, pipe or device"):
            decode(tmp_path / name)
