"""`--threads`, and a warning where the machine has fewer free cores than PyTorch uses threads."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.errors import BbmoeWarning

# A shorter look at the cores says little: the system counts in hundredths of a second.
SHORTEST_LOOK = 0.3
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def threads_option(function: Any) -> Any:
    """Add `--threads` to a command."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="CPU threads; another number changes the last digits.  [PyTorch's: one a core]",
    )(function)


def use_threads(threads: int | None, look: Look, device: str | None) -> None:
    """Let PyTorch use so many threads on the CPU.

    Args:
        threads: The number; None leaves PyTorch's own, and warns if fewer cores than that are free.
        look: A look at the cores begun earlier.
        device: The device that is asked for; no warning where it is a GPU.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif device == "cpu" or (device in (None, "auto") and not torch.cuda.is_available()):
        warn_of_busy_cores(torch.get_num_threads(), look)


def warn_of_busy_cores(threads: int, look: Look) -> None:
    """Warn if so many threads would wait for each other, as fewer cores are free for them."""
    free = look.free_cores()
    if free is not None and threads > max(1, round(free)):
        warnings.warn(
            f"{threads} threads on {look.cores:g} cores, of which about {max(0.0, free):.1f} are free: threads that "
            f"wait for each other can be slower than fewer; try --threads {max(1, round(free))} "
            "(which changes the last digits of the numbers)",
            BbmoeWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class Look:
    """How busy the cores were at some moment; a second look says how many were free in between.

    Attributes:
        cores: Cores that this process may use: those it is bound to, or fewer if a container has a quota.
        time: Seconds on a monotonic clock.
        busy: Seconds that these cores have worked since the start of the system; None if it does not say.
        own: Of these, the seconds that this process has taken.
    """

    cores: float
    time: float
    busy: float | None
    own: float

    @classmethod
    def now(cls) -> Look:
        """Look at the cores now."""
        places = os.sched_getaffinity(0)
        quota = _quota()
        cores = len(places) if quota is None else min(len(places), quota)
        return cls(cores, time.monotonic(), _busy_seconds(places), time.process_time())

    def free_cores(self) -> float | None:
        """How many cores other processes have left free since this look; None if that is not known."""
        now = Look.now()
        passed = now.time - self.time
        if self.busy is None or now.busy is None or passed < SHORTEST_LOOK:
            return None
        others = max(0.0, (now.busy - self.busy) - (now.own - self.own)) / passed
        return min(self.cores, len(os.sched_getaffinity(0)) - others)


def _busy_seconds(places: set[int]) -> float | None:
    """Seconds that some cores have worked since the start, by /proc/stat."""
    try:
        lines = (PROC / "stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    names = {f"cpu{place}" for place in places}
    found = [
        list(map(int, rest.split()))
        for name, _, rest in (line.partition(" ") for line in lines)
        if name in names
    ]
    # Fields of a core: user, nice, system, idle, waiting for input and output, and two kinds of interrupts.
    busy = sum(sum(fields[:3]) + sum(fields[5:7]) for fields in found)
    return busy / os.sysconf("SC_CLK_TCK") if found else None


def _quota() -> float | None:
    """How many cores' time a container may use; None if it has no limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # No such file, or "max".
        return None
