"""The CPU cores that this process may use."""

from __future__ import annotations

import os

# PyTorch ends the process, without an error, if the system cannot start so many threads.
MOST_THREADS = 1024
# The largest number of parallel runs, each of which is a process.
MOST_WORKERS = 1024


def usable_cores() -> set[int]:
    """Return the numbers of the cores that this process may run on; never empty.

    On macOS and Windows, which have no `os.sched_getaffinity`, these are all cores.
    """
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
