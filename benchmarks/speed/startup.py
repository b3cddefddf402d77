"""Wall time of short `bbmoe` commands, and of an empty Python process for comparison.

    python benchmarks/speed/startup.py [--repeats 10] [--json FILE]

Prints medians over the repeats. The commands alternate, after one run of each that fills the file cache and writes the
byte code. CPU seconds are also shown, as they are more reliable on a busy machine.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from typing import Any

from common import Child, at_least_one, bbmoe_command, environment_of, finish, make_parser, run_child, verdict
from rich.table import Table

FLOOR = "python -c pass"
# Command -> goal in seconds, and expected exit code.
COMMANDS: dict[str, tuple[float | None, int]] = {
    FLOOR: (None, 0),
    "bbmoe --help": (0.3, 0),
    "bbmoe list": (1.0, 0),
    "bbmoe attack --trigger wrap": (1.0, 2),
}


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=at_least_one, default=10)
    arguments = parser.parse_args()
    result = measure(arguments.repeats)
    finish(result, make_table(result), [], arguments.json)


def measure(repeats: int) -> dict[str, Any]:
    """Run the commands in turn. Exits if a command has an unexpected exit code."""
    children: dict[str, list[Child]] = {command: [] for command in COMMANDS}
    for _ in range(repeats + 1):
        for command, runs in children.items():
            runs.append(run_once(command))
    return {
        "benchmark": "startup",
        "repeats": repeats,
        "commands": {command: summary(command, runs[1:]) for command, runs in children.items()},
        "environment": environment_of(),
    }


def run_once(command: str) -> Child:
    """Run one of the commands."""
    program, *arguments = shlex.split(command)
    child = run_child(
        [*([sys.executable] if program == "python" else bbmoe_command()), *arguments], quiet=True
    )
    expected = COMMANDS[command][1]
    if child.returncode != expected:
        sys.exit(f"{command}: expected exit code {expected}, got {child.returncode}")
    return child


def summary(command: str, runs: list[Child]) -> dict[str, Any]:
    """Return the medians of a command, and whether it meets its goal."""
    seconds = [child.seconds for child in runs]
    goal = COMMANDS[command][0]
    return {
        "seconds": statistics.median(seconds),
        "seconds_runs": seconds,
        "cpu_seconds": statistics.median(child.cpu_seconds for child in runs),
        "goal_seconds": goal,
        "goal_met": None if goal is None else statistics.median(seconds) <= goal,
    }


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per command."""
    table = Table("command", title=f"Start-up, median of {result['repeats']}", title_justify="left")
    for column in ("seconds", "lowest", "CPU s", "goal", ""):
        table.add_column(column, justify="right")
    for command, row in result["commands"].items():
        times = (row["seconds"], min(row["seconds_runs"]), row["cpu_seconds"])
        goal = ("", "")
        if row["goal_seconds"] is not None:
            goal = (f"{row['goal_seconds']:g}", verdict(row["goal_met"]))
        table.add_row(command, *(f"{value:.3f}" for value in times), *goal)
    return table


if __name__ == "__main__":
    main()
