"""Decoding and resizing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorbench_moe.data.base import draw_subset
from backdoorbench_moe.data.images import Form, read_images, resize, resize_and_crop
from backdoorbench_moe.errors import DataError
from backdoorbench_moe.image_files import read_image


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def test_pixels_come_through_in_order(tmp_path, rng) -> None:
    pixels = rng.integers(0, 256, (150, 8, 8, 3), np.uint8)
    paths = [save(tmp_path / f"{i}.png", picture) for i, picture in enumerate(pixels)]
    np.testing.assert_array_equal(read_images(paths, Form(8, crop=True)), pixels.transpose(0, 3, 1, 2))


def test_resize_of_a_whole_picture_and_of_its_middle(tmp_path) -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200  # The middle 4x4.
    path = save(tmp_path / "wide.png", wide)
    assert (read_images([path], Form(4, crop=True)) == 200).all()
    # Halving with a triangle filter of width 4: (1, 3, 3, 1)/8 of columns 2i-1 to 2i+2, less at edges.
    columns = [200 * share for share in (1 / 7, 7 / 8, 7 / 8, 1 / 7)]
    expected = np.broadcast_to(np.round(columns), (1, 3, 4, 4))
    np.testing.assert_allclose(read_images([path], Form(4, crop=False)), expected, atol=1)


def test_a_strip_that_would_take_gigabytes_is_refused(tmp_path) -> None:
    """With its shorter side of one pixel at 64, the longer one of 20000 would have 1280000."""
    good = save(tmp_path / "good.png", np.zeros((64, 64, 3), np.uint8))
    for shape in ((20_000, 1, 3), (1, 20_000, 3)):
        path = save(tmp_path / "strip.png", np.zeros(shape, np.uint8))
        width, height = shape[1], shape[0]
        with pytest.raises(
            DataError, match=rf"longer side is at most \d+ pixels.*got one of {width}x{height}"
        ):
            resize_and_crop(Image.open(path), 64, 56)
        with pytest.raises(DataError, match=r"strip\.png: .*longer side.*; 1 more of 3 files"):
            read_images([good, path, path], Form(56, crop=True, resize=64))


def test_long_images_that_fit_are_resized_as_by_pil(rng) -> None:
    picture = Image.fromarray(rng.integers(0, 256, (2, 600, 3), np.uint8))
    whole = picture.resize((9600, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(whole)[2:30, 4786:4814]
    np.testing.assert_array_equal(np.asarray(resize_and_crop(picture, 32, 28)), expected)


def test_batched_resize_agrees_with_pil(rng) -> None:
    pixels = rng.integers(0, 256, (1030, 9, 9, 3), np.uint8)
    batch = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    for size in (4, 15):
        resized = resize(batch, size)
        assert resized.shape == (1030, 3, size, size) and resized.dtype == torch.uint8
        for index in (0, 1029):
            expected = Image.fromarray(pixels[index]).resize((size, size), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(resized[index].permute(1, 2, 0), np.asarray(expected), atol=1)


def test_resize_to_one_pixel() -> None:
    half = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    half[0, :, :, 4:], half[1] = 200, 7
    assert resize(half, 1).flatten(1).tolist() == [[100] * 3, [7] * 3]


def test_resize_to_the_same_size_is_no_copy(rng) -> None:
    batch = torch.zeros(2, 3, 5, 5, dtype=torch.uint8)
    assert resize(batch, 5) is batch


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_modes_that_lose_nothing(tmp_path, mode) -> None:
    pixels = np.full((3, 3, 3), 255, np.uint8)
    pixels[1] = 0
    path = save(tmp_path / "image.png", pixels, mode)
    assert Image.open(path).mode == mode
    np.testing.assert_array_equal(np.asarray(read_image(path)), pixels)


def test_opaque_alpha_is_no_transparency(tmp_path, rng) -> None:
    pixels = rng.integers(0, 256, (3, 3, 4), np.uint8)
    pixels[..., 3] = 255
    image = read_image(save(tmp_path / "opaque.png", pixels))
    np.testing.assert_array_equal(np.asarray(image), pixels[..., :3])
    pixels[1, 1, 3] = 254
    with pytest.raises(DataError, match=r"clear\.png: expected .*, got mode RGBA with transparent pixels"):
        read_image(save(tmp_path / "clear.png", pixels))


def test_transparent_palette_and_transparent_colour(tmp_path) -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    with pytest.raises(DataError, match="got mode P with transparent pixels"):
        read_image(tmp_path / "palette.png")
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "colour.png", transparency=(1, 2, 3))
    with pytest.raises(DataError, match="got mode RGB with transparent pixels"):
        read_image(tmp_path / "colour.png")


def test_modes_that_would_lose_something(tmp_path) -> None:
    Image.new("CMYK", (2, 2)).save(tmp_path / "print.jpg")
    with pytest.raises(DataError, match=r"print\.jpg: expected .*, got mode CMYK"):
        read_image(tmp_path / "print.jpg")
    path = save(tmp_path / "deep.png", np.full((2, 2), 40_000, np.uint16))
    with pytest.raises(DataError, match=r"deep\.png: expected .*, got mode I"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "ppm", "bmp", "webp"])
def test_damaged_files_are_named(tmp_path, rng, suffix) -> None:
    good = [save(tmp_path / f"good{i}.png", np.zeros((4, 4, 3), np.uint8)) for i in range(70)]
    path = save(tmp_path / f"bad.{suffix}", rng.integers(0, 256, (40, 40, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"bad\.{suffix}: cannot be read as an image"):
        read_images([*good, path], Form(4, crop=False))


def test_other_formats_are_not_tried(tmp_path) -> None:
    path = tmp_path / "vector.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(DataError, match=r"vector\.png: cannot be read as an image"):
        read_image(path)


def test_a_subset_is_drawn_from_all_images_once_and_for_each_split_anew() -> None:
    """The mean of 100 of 1000 places has a standard deviation of 27; those of the two splits share about 10."""
    train, test = (draw_subset(1000, 100, name) for name in ("train_images", "test_images"))
    for drawn in (train, test):
        assert len(drawn) == 100 and (drawn.diff() > 0).all() and 0 <= drawn[0] <= drawn[-1] < 1000
        assert abs(drawn.double().mean().item() - 499.5) < 4 * 27.4
    assert torch.equal(train, draw_subset(1000, 100, "train_images"))
    assert len(set(train.tolist()) & set(test.tolist())) < 30
    assert (
        draw_subset(5, None, "train_images").tolist()
        == draw_subset(5, 5, "train_images").tolist()
        == [*range(5)]
    )
