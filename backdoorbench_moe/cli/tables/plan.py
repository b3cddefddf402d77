"""Missing runs and their estimated time, as `--dry-run` prints them, and its progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from backdoorbench_moe.cli.terminal.streams import echo, say
from backdoorbench_moe.durations import say_time
from backdoorbench_moe.wording.counting import count

if TYPE_CHECKING:
    from backdoorbench_moe.bench.running.plan import Planned
    from backdoorbench_moe.cli.terminal.threads import CoreUsage

# Runs, each with the seconds that it still takes; None if unknown.
Estimates = Sequence[tuple["Planned", float | None]]
UNKNOWN = "not known"
# Cores used by other programs from which on an estimate says so.
BUSY = 0.5


class PlanProgress(AbstractContextManager["PlanProgress"]):
    """Progress of a dry run, which takes minutes for a long queue: bars on a terminal, otherwise one line.

    Args:
        quiet: Whether to show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, is_live = quiet, sys.stderr.isatty() and not quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_live)
        self._checks = self._bars.add_task("checking cells", total=None)
        self._kinds = self._bars.add_task("timing kinds of runs", total=None, visible=False)

    def __enter__(self) -> PlanProgress:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bars.stop()

    def on_check(self, done: int, total: int) -> None:
        """Show the number of checked cells of a suite, and of all its cells."""
        self._bars.update(self._checks, completed=done, total=total)

    def on_time(self, done: int, total: int) -> None:
        """Show the number of kinds of runs that have been timed, and of all kinds."""
        self._bars.update(self._kinds, completed=done, total=total, visible=True)
        if total and not done and self._bars.disable and not self._quiet:
            say(f"timing a few batches of {count(total, 'kind')} of runs")


def plan_table(planned: Estimates) -> Table:
    """Build a table with one row per run: name, status, epochs, and the time left."""
    table = Table("run", "status", "epochs", "time left", box=None, pad_edge=False)
    for run, seconds in planned:
        epochs = f"{run.epochs:.0f}/{run.total_epochs}"
        table.add_row(run.spec.name, run.status, epochs, time_left([(run, seconds)]))
    return table


def time_left(planned: Estimates) -> str:
    """Return the total time of runs, without those of unknown time; a dash if all are finished."""
    known = [seconds for _, seconds in planned if seconds is not None]
    if planned and not known:
        return UNKNOWN
    return say_time(sum(known)) if sum(known) else "–"


def total_line(planned: Estimates, usage: CoreUsage) -> str:
    """Return a line with the number of runs and the total time of the missing ones.

    Args:
        planned: The runs and their times.
        usage: Usage of the cores before the times were measured. The line says if other programs used a core since,
            because the runs then take less time without them.
    """
    finished = sum(run.status == "finished" for run, _ in planned)
    total = say_time(sum(seconds or 0.0 for _, seconds in planned))
    unknown = sum(seconds is None for _, seconds in planned)
    without = f", without {count(unknown, 'run')} of unknown time" if unknown else ""
    others = usage.cores_of_others() or 0.0
    beside = f" while other programs used {others:.1f} of {usage.cores:g} cores" if others >= BUSY else ""
    return (
        f"{count(len(planned), 'run')}, {finished} finished; about {total} left on this machine, one run at a time "
        f"(measured just now{beside}{without})"
    )


def plan_document(planned: Estimates) -> dict[str, Any]:
    """Return the runs and the total time as plain values; unknown times are None and not part of the total."""
    runs = [
        {
            "run": run.spec.name,
            "status": run.status,
            "epochs": run.epochs,
            "total_epochs": run.total_epochs,
            "seconds_left": seconds,
        }
        for run, seconds in planned
    ]
    return {"runs": runs, "seconds_left": sum(seconds or 0.0 for _, seconds in planned)}


def print_plan(planned: Estimates, usage: CoreUsage, *, as_json: bool = False) -> None:
    """Print the runs and the total time, as a table or as JSON; see `total_line`."""
    if as_json:
        echo(json.dumps(plan_document(planned), indent=2))
        return
    console = Console(highlight=False)
    console.print(plan_table(planned))
    console.print(total_line(planned, usage))
