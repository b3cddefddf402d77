"""Build the setup of a run on images or texts."""

from __future__ import annotations

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Material, as_images
from backdoorbench_moe.data.text import TextSet
from backdoorbench_moe.engine.setups.base import Setup
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.engine.setups.texts import TextSetup


def make_setup(spec: RunSpec, data: Material) -> Setup:
    """Build the parts of a run.

    Args:
        spec: The run's spec.
        data: The data, on the device.

    Raises:
        BbmoeError: Parts are incompatible with the data or each other.
    """
    return TextSetup(spec, data) if isinstance(data, TextSet) else ImageSetup(spec, as_images(data))
