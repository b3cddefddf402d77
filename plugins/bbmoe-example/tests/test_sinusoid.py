"""The trigger, found by its entry point."""

import math

import pytest
import torch

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import create_trigger


def test_four_columns_by_hand():
    """One period over four columns: cos is 1, 0, -1, 0; the last image is clipped to [0, 1]."""
    trigger = create_trigger("sinusoid", amplitude=0.25, frequency=1)
    stamped = trigger(torch.tensor([0.5, 1.0])[:, None, None, None].expand(2, 3, 2, 4))
    want = torch.tensor([[0.75, 0.5, 0.25, 0.5], [1.0, 1.0, 0.75, 1.0]])
    torch.testing.assert_close(stamped, want[:, None, None].expand(2, 3, 2, 4))


def test_the_spectrum_is_one_line():
    change = create_trigger("sinusoid")(torch.full((1, 1, 1, 32), 0.5, dtype=torch.float64)) - 0.5
    spectrum = torch.fft.rfft(change.flatten()).abs() * 2 / 32
    assert spectrum.argmax() == 6 and math.isclose(spectrum[6], 20 / 255, abs_tol=1e-6)
    assert spectrum.sum() - spectrum[6] < 1e-5


@pytest.mark.parametrize("options", [{"amplitude": 0.0}, {"amplitude": math.nan}, {"frequency": 0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"sinusoid: {next(iter(options))}: expected"):
        create_trigger("sinusoid", **options)
