"""`--threads`, and a warning if fewer cores are free than PyTorch uses threads."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.errors import BbmoeWarning
from backdoorbench_moe.process.cores import MOST_THREADS, usable_cores

# The system counts in hundredths of a second, so a shorter measurement is inaccurate.
SHORTEST_SECONDS = 0.3
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def threads_option(function: Any) -> Any:
    """Add `--threads` to a command."""
    return click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        metavar="N",
        help="CPU threads; their number affects the last digits of results.  [PyTorch's: one per core]",
    )(function)


def use_threads(threads: int | None, usage: CoreUsage, device: str | None) -> None:
    """Set the number of CPU threads of PyTorch.

    Args:
        threads: The number; None keeps PyTorch's default, and warns if fewer cores are free.
        usage: Usage of the cores at the start of the command.
        device: The requested device; there is no warning for a GPU.
    """
    import torch

    if threads is not None:
        if threads > usage.cores:
            warnings.warn(
                f"--threads {threads} on {usage.cores:g} cores: threads that wait for each other are slower than fewer",
                BbmoeWarning,
                stacklevel=2,
            )
        torch.set_num_threads(threads)
    elif device == "cpu" or (device in (None, "auto") and not torch.cuda.is_available()):
        warn_of_busy_cores(torch.get_num_threads(), usage)


def warn_of_busy_cores(threads: int, usage: CoreUsage) -> None:
    """Warn if fewer than `threads` cores are free, so that threads would wait for each other."""
    free = usage.free_cores()
    if free is not None and threads > max(1, round(free)):
        warnings.warn(
            f"{threads} threads on {usage.cores:g} cores, of which about {max(0.0, free):.1f} are free: threads that "
            f"wait for each other can be slower than fewer; try --threads {max(1, round(free))} "
            "(which changes the last digits of the numbers)",
            BbmoeWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class CoreUsage:
    """Time for which the cores available to this process have been busy, at one moment.

    Attributes:
        cores: Number of cores that this process may use: those it is bound to, or fewer if a container has a quota.
        time: Seconds on a monotonic clock.
        busy: Seconds for which these cores have been busy since the system started; None if the system does not
            report them.
        own: CPU seconds used by this process.
    """

    cores: float
    time: float
    busy: float | None
    own: float

    @classmethod
    def now(cls) -> CoreUsage:
        """Read the current usage."""
        numbers = usable_cores()
        quota = _quota()
        cores = len(numbers) if quota is None else min(len(numbers), quota)
        return cls(cores, time.monotonic(), _busy_seconds(numbers), time.process_time())

    def cores_of_others(self) -> float | None:
        """Compute how many cores other processes have used since then, on average; None if unknown."""
        now = CoreUsage.now()
        passed = now.time - self.time
        if self.busy is None or now.busy is None or passed < SHORTEST_SECONDS:
            return None
        return max(0.0, (now.busy - self.busy) - (now.own - self.own)) / passed

    def free_cores(self) -> float | None:
        """Compute how many cores other processes have left free since then; None if unknown."""
        others = self.cores_of_others()
        return None if others is None else min(self.cores, len(usable_cores()) - others)


def _busy_seconds(numbers: set[int]) -> float | None:
    """Return the busy seconds of some cores since the system started, from /proc/stat; None without that file."""
    try:
        lines = (PROC / "stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    names = {f"cpu{number}" for number in numbers}
    found = [
        list(map(int, rest.split()))
        for name, _, rest in (line.partition(" ") for line in lines)
        if name in names
    ]
    # Fields of a core: user, nice, system, idle, I/O wait, and two kinds of interrupts.
    busy = sum(sum(fields[:3]) + sum(fields[5:7]) for fields in found)
    return busy / os.sysconf("SC_CLK_TCK") if found else None


def _quota() -> float | None:
    """Return the number of cores that a container's quota allows; None without a quota."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # No such file, or "max".
        return None
