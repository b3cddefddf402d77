"""The blend: its formula, its pictures, and files that are none."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.triggers import create_trigger
from backdoorbench_moe.triggers.blend import Blend
from backdoorbench_moe.triggers.picture import draw_quilt

QUILT = "8d2ac3cc051fb05fb71901255f39bf04ee37ccd2738ac7cbb5b46a28fa729a8c"


def save(path: Path, pixels: object, mode: str | None = None) -> str:
    picture = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    (picture.convert(mode) if mode else picture).save(path)
    return str(path)


def test_the_formula_on_a_picture_of_the_canvas_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3))
    images = torch.rand(5, 3, 8, 6)
    picture = torch.from_numpy(pixels / 255).permute(2, 0, 1).float()
    for ratio in (0.1, 0.5, 1.0):
        blended = Blend(ratio=ratio, image=save(tmp_path / "picture.png", pixels))(images)
        torch.testing.assert_close(blended, (1 - ratio) * images + ratio * picture.expand(5, -1, -1, -1))


def test_the_picture_is_resized_as_pil_does(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 40, 3))
    path = save(tmp_path / "picture.png", pixels)
    with Image.open(path) as file:
        expected = np.asarray(file.resize((12, 4), Image.Resampling.BILINEAR)) / 255
    blended = Blend(ratio=1.0, image=path)(torch.rand(1, 3, 4, 12))
    np.testing.assert_allclose(blended[0].permute(1, 2, 0), expected, atol=1 / 255)


def test_our_own_picture_keeps_structure_down_to_a_tile() -> None:
    assert draw_quilt().shape == (1, 3, 128, 128)
    for size in (32, 8, 4):
        picture = Blend(ratio=1.0)(torch.rand(1, 3, size, size))
        assert picture.std((2, 3)).min() > 0.1


def test_our_own_picture_does_not_change() -> None:
    """Another picture is another attack: results under the old one would no longer compare."""
    pixels = (draw_quilt() * 255).round().byte().numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == QUILT


def test_one_object_stamps_images_and_tiles_of_any_type() -> None:
    blend = Blend(ratio=1.0)
    for size in (32, 4, 32):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            stamped = blend(torch.rand(2, 3, size, size).to(dtype))
            expected = Blend(ratio=1.0)(torch.zeros(2, 3, size, size)).to(dtype)
            assert torch.equal(stamped, expected)


def test_a_user_that_does_not_exist_is_an_error_of_the_option() -> None:
    with pytest.raises(
        ConfigError, match=r"^blend: image: expected an existing user behind '~', got '~nobody"
    ):
        Blend(image="~nobody-of-this-name/picture.png")


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_grey_and_palette_pictures_are_taken(tmp_path: Path, mode: str) -> None:
    pixels = np.full((4, 4, 3), 51)  # one of the palette's colours
    picture = Blend(image=save(tmp_path / "picture.png", pixels, mode)).picture
    torch.testing.assert_close(picture, torch.full((1, 3, 4, 4), 0.2))


def test_grey_images_get_the_pictures_luma(tmp_path: Path) -> None:
    red = np.zeros((4, 4, 3))
    red[..., 0] = 255
    blended = Blend(ratio=1.0, image=save(tmp_path / "red.png", red))(torch.rand(1, 1, 4, 4))
    torch.testing.assert_close(blended, torch.full((1, 1, 4, 4), 0.299))
    with pytest.raises(ShapeError, match="1 or 3 channels, got 2"):
        Blend()(torch.rand(1, 2, 4, 4))


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "LA", "I;16"])
def test_other_modes_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(ConfigError, match=rf"blend: image: .*picture\.tiff.*got mode {mode}"):
        Blend(image=str(path))


def test_files_that_are_no_picture(tmp_path: Path) -> None:
    whole = Path(save(tmp_path / "whole.png", np.random.default_rng(2).integers(0, 256, (64, 64, 3))))
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    for name in ("half.png", "text.png", "empty.png", "missing.png", "."):
        with pytest.raises(
            ConfigError, match=r"blend: image: (expected a picture file|.* cannot be read as an image)"
        ):
            create_trigger("blend", image=str(tmp_path / name))


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), "half"])
def test_bad_ratios(ratio: object) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        create_trigger("blend", ratio=ratio)


def test_gradients_are_weighted() -> None:
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    Blend(ratio=0.25)(images).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 0.75))


def test_a_picture_made_in_inference_mode_serves_training() -> None:
    blend, images = Blend(), torch.rand(1, 3, 4, 4)
    with torch.inference_mode():
        blend(images)
    assert blend(images.requires_grad_()).requires_grad
