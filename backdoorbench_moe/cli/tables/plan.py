"""Missing runs and their estimated time, as `--dry-run` prints them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.durations import say_time
from backdoorbench_moe.wording.counting import count

if TYPE_CHECKING:
    from backdoorbench_moe.bench.running.plan import Planned

# Runs, each with the seconds that it still takes; None if unknown.
Estimates = Sequence[tuple["Planned", float | None]]
UNKNOWN = "not known"


def plan_table(planned: Estimates) -> Table:
    """Build a table with one row per run: name, status, epochs, and the time left."""
    table = Table("run", "status", "epochs", "time left", box=None, pad_edge=False)
    for run, seconds in planned:
        epochs = f"{run.epochs:.0f}/{run.total_epochs}"
        left = UNKNOWN if seconds is None else say_time(seconds) if seconds else "–"
        table.add_row(run.spec.name, run.status, epochs, left)
    return table


def total_line(planned: Estimates) -> str:
    """Return a line with the number of runs and the total time of the missing ones."""
    finished = sum(run.status == "finished" for run, _ in planned)
    total = say_time(sum(seconds for _, seconds in planned if seconds is not None))
    unknown = sum(seconds is None for _, seconds in planned)
    without = f", without {count(unknown, 'run')} of unknown time" if unknown else ""
    return (
        f"{count(len(planned), 'run')}, {finished} finished; about {total} left on this machine, one run at a time "
        f"(measured just now{without})"
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


def print_plan(planned: Estimates, *, as_json: bool = False) -> None:
    """Print the runs and the total time, as a table or as JSON."""
    if as_json:
        echo(json.dumps(plan_document(planned), indent=2))
        return
    console = Console(highlight=False)
    console.print(plan_table(planned))
    console.print(total_line(planned))
