"""`bbmoe bench`: suites of runs, their tables and pages; one file per command."""

from __future__ import annotations

import click

from backdoorbench_moe.cli.app import LazyGroup

COMMANDS = {
    "run": "Run the unfinished runs of a suite and print its tables.",
    "queue": "Run several suites within a time budget and save their results.",
    "table": "Print a suite's tables from its run folders.",
    "page": "Write the leaderboards of several suites to one HTML page.",
    "compare": "Compare two suites or results folders.",
    "export": "Write all records of a suite to a CSV or JSON Lines file.",
    "suites": "List the built-in suites.",
}


@click.group("bench", cls=LazyGroup, commands_help=COMMANDS, package=__package__)
def command() -> None:
    """Run suites of experiments, resume them, distribute them, and compare their results.

    A suite is a YAML file. Its cells are combinations of settings, and each cell is run with several seeds.
    """
