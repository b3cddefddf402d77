"""The CPU cores that this process may use."""

from __future__ import annotations

import os


def usable_cores() -> set[int]:
    """Return the numbers of the cores that this process is bound to, or of all cores where that cannot be asked.

    macOS and Windows have no `os.sched_getaffinity`. There is always at least one core.
    """
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
