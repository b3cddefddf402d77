"""Keep freed memory for the next tensor instead of returning it to the system."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's `mallopt`, from malloc.h: the size above which every tensor gets new memory from the system, the
# amount of free memory above which some is returned, and the amount that is requested in advance.
MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2
LARGEST = 2**31 - 1
VALUES = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: LARGEST, TOP_PAD: 256 << 20}
# The user's settings, which take precedence.
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make the C library of this process keep freed memory.

    By default, glibc returns the memory of large tensors to the system as soon as they are freed. At every step, the
    system then clears the pages of the next tensor and maps them one by one, which takes 15 to 35% of the time of a
    network on the CPU (`benchmarks/speed/allocator.py`). With this setting, the process keeps its maximum size until it
    ends.

    Nothing is changed if the user has set `MALLOC_...` or `GLIBC_TUNABLES`, or if the C library is not glibc.

    Returns:
        Whether the setting was changed.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS and Windows.
        return False
    accepted = [mallopt(parameter, value) == 1 for parameter, value in VALUES.items()]
    return all(accepted)
