"""`bbmoe plugin check`: run the conformance tests on the parts of a package."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.wording.counting import count

if TYPE_CHECKING:
    from rich.console import Console

    from backdoorbench_moe.testing.check import Deviation, Failure, PackageCheck, PartCheck

FAILED = 1
# Seconds; the slowest conformance test of a built-in part takes ten.
TIMEOUT = 300
STYLES = {"passes": "green", "fails": "red", "broken": "red"}


@click.command("check")
@click.argument("package")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=TIMEOUT,
    show_default=True,
    help="Time limit of each test, in seconds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(package: str, timeout: float, as_json: bool) -> None:
    """Run the conformance tests on all parts that the installed PACKAGE registers. Exit code 1: a test failed.

    Needs pytest, and pytest-timeout for --timeout: pip install 'backdoorbench-moe[plugin]'. To run the tests with
    pytest's own output and flags: python -m backdoorbench_moe.testing PACKAGE
    """
    from rich.console import Console

    from backdoorbench_moe.testing.check import check_package

    with Console(stderr=True).status(f"running the conformance tests on {package}"):
        check = check_package(package, timeout=timeout)
    if as_json:
        echo(json.dumps({**asdict(check), "passes": check.passes}, indent=2))
    else:
        _print(check)
    if not check.passes:
        sys.exit(FAILED)


def _print(check: PackageCheck) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{check.package} {check.version}, interface {' or '.join(check.interfaces)}", markup=False)
    table = Table("kind", "name", "result", box=None, pad_edge=False)
    for column in ("passed", "failed", "skipped", "deviations"):
        table.add_column(column, justify="right")
    for part in check.parts:
        counts = (part.passed, part.failed, part.skipped, len(part.deviations))
        result = f"[{STYLES[part.result]}]{part.result}[/]"
        table.add_row(
            part.kind, part.name, result, *("" if part.result == "broken" else str(n) for n in counts)
        )
    console.print(table)
    for part in check.parts:
        _print_failures(console, part)
        _print_deviations(console, part)
    if check.passes:
        deviations = sum(len(part.deviations) for part in check.parts)
        but = f", with {count(deviations, 'deviation')}" if deviations else ""
        console.print(f"all parts of {check.package} conform to their interfaces{but}", markup=False)


def _share(test: Failure | Deviation) -> str:
    return f" in {test.failing} of {test.cases} cases" if test.cases > 1 else ""


def _print_deviations(console: Console, part: PartCheck) -> None:
    if part.deviations:
        told = "; ".join(f"{one.test}{_share(one)} ({one.reason})" for one in part.deviations)
        text = f"{part.kind} {part.name} has {count(len(part.deviations), 'deviation')}: {told}"
        console.print(text, style="yellow", markup=False, soft_wrap=True)


def _print_failures(console: Console, part: PartCheck) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    where = f"{part.kind} {part.name}"
    if part.reason:
        say(f"{where} {part.result}: {part.reason}", "red")
    reasons: dict[str, list[Failure]] = {}
    for failure in part.failures:
        reasons.setdefault(failure.reason, []).append(failure)
    for failure, *others in reasons.values():
        say(f"{where} fails {failure.test}{_share(failure)}", "red")
        say(f"  {failure.reason}")
        if failure.line:
            say(f"  {failure.line}")
        if failure.case != failure.test:
            say(f"  first: {failure.case}")
        if others:
            say(f"  for the same reason: {', '.join(other.test for other in others)}")
