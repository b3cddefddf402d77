"""Memory that was freed is kept for the next tensor, instead of being returned to the system."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's `mallopt`, from malloc.h: the size from which memory is asked from the system for every tensor
# anew, the free memory from which some is returned, and the memory that is asked for in advance.
MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2
LARGEST = 2**31 - 1
VALUES = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: LARGEST, TOP_PAD: 256 << 20}
# Settings of the user, which have precedence.
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make the C library of this process keep freed memory.

    By default, glibc returns the memory of large tensors to the system as soon as they are freed. The system clears
    the pages of the next tensor and maps them one by one, at every step: 15 to 35% of the time of a network on the CPU
    (`benchmarks/speed/allocator.py`). The process keeps its largest size until it ends.

    Nothing is changed where the user set `MALLOC_...` or `GLIBC_TUNABLES`, or where the C library is another one.

    Returns:
        Whether it was done.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS and Windows.
        return False
    accepted = [mallopt(parameter, value) == 1 for parameter, value in VALUES.items()]
    return all(accepted)
