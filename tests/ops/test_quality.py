"""PSNR and SSIM of pairs."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.ops.quality import psnr, ssim


def test_psnr_is_that_of_each_pair() -> None:
    images = torch.zeros(3, 3, 8, 8)
    others = torch.stack([images[0], images[0] + 0.1, images[0] + 1])
    assert psnr(images, others).tolist() == pytest.approx([float("inf"), 20, 0], abs=1e-4)


def test_ssim_of_flat_images_by_hand() -> None:
    # Without variance only the luminance term is left: (2 a b + c1) / (a² + b² + c1), c1 = 0.01².
    first, second = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25)
    expected = (2 * 0.125 + 1e-4) / (0.25 + 0.0625 + 1e-4)
    assert ssim(first.double(), second.double()).item() == pytest.approx(expected, abs=1e-5)


def test_ssim_does_not_mix_pairs() -> None:
    images, others = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    others[0] = images[0]
    both = ssim(images, others)
    assert both[0] == pytest.approx(1, abs=1e-4)
    assert both[1] < 0.5
    assert both[1] == pytest.approx(ssim(images[1:], others[1:]).item(), abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 10, 32])
def test_any_size_and_half_precision(size: int) -> None:
    images = torch.rand(2, 3, size, size).bfloat16()
    for measure in (psnr, ssim):
        result = measure(images, images * 0.5)
        assert result.shape == (2,) and result.dtype == torch.float32 and result.isfinite().all()


def test_no_images() -> None:
    nothing = torch.rand(0, 3, 8, 8)
    assert psnr(nothing, nothing).shape == ssim(nothing, nothing).shape == (0,)


def test_different_shapes_are_refused() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ShapeError, match="others"):
            measure(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 4))
