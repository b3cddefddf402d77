"""`bbmoe bench`: suites of runs, their tables, and what is made of them; one file a command."""

from __future__ import annotations

import click

from backdoorbench_moe.cli.app import LazyGroup

COMMANDS = {
    "run": "Make the runs of a suite that are not there yet.",
    "queue": "Make the runs of several suites within a budget, and save them.",
    "table": "Draw a suite's tables from its run folders.",
    "page": "Draw a leaderboard of several suites as one page.",
    "compare": "Set two suites or result folders side by side.",
    "export": "Write all records of a suite as one tidy CSV and as lines of JSON.",
    "suites": "List the suites that come with the project.",
}


@click.group("bench", cls=LazyGroup, commands_help=COMMANDS, package=__package__)
def command() -> None:
    """Turn a YAML list of runs into tables; stopped, resumed, spread out and compared."""
