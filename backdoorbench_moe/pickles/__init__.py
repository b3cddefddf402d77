"""Reading pickles as data, without importing or calling anything that they refer to."""

from backdoorbench_moe.pickles.arrays import NUMPY, PickledArray
from backdoorbench_moe.pickles.machine import Global, Limits, Stateful, read_value
from backdoorbench_moe.pickles.structure import check_structure

__all__ = ["NUMPY", "Global", "Limits", "PickledArray", "Stateful", "check_structure", "read_value"]
