"""DCT patterns against SciPy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn, idctn

from backdoorbench_moe.ops.frequency import dct_image, smooth_field


@given(height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_an_image_has_one_coefficient(height: int, width: int, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    expected = np.zeros((height, width))
    expected[row, column] = 1
    np.testing.assert_allclose(
        dctn(dct_image(height, width, row, column).numpy(), norm="ortho"), expected, atol=1e-12
    )


def test_a_field_is_the_inverse_transform_of_its_amplitudes() -> None:
    """Each wave has amplitude 1 instead of norm 1."""
    amplitudes = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for height, width in ((3, 3), (8, 5), (2, 32)):
        spectrum = np.zeros((2, height, width))
        rows = min(3, height)
        spectrum[:, :rows, :3] = amplitudes[:, :rows]
        norms = [np.sqrt(size / np.where(np.arange(size) == 0, 1, 2)) for size in (height, width)]
        expected = idctn(spectrum * np.outer(*norms), axes=(1, 2), norm="ortho")
        np.testing.assert_allclose(smooth_field(amplitudes, height, width), expected, atol=1e-12)
