"""Terminal output of an audit: its verdict and findings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from backdoorbench_moe.auditing.audit import Audit

NONE = "–"


def print_audit(audit: Audit, files: list[Path]) -> None:
    """Print the verdict, the three strongest reasons, all findings, and the paths of the files."""
    from backdoorbench_moe.auditing.document import above_line, as_document, by_why_not, thresholds_line
    from backdoorbench_moe.auditing.report import reasons_title
    from backdoorbench_moe.auditing.verdict import NOT_TESTED, RULE, SIGNS

    console = Console(highlight=False)
    style = "bold red" if audit.verdict.level == SIGNS else "bold"
    console.print(f"{audit.name}: {audit.verdict.level}", style=style, markup=False)
    if audit.doubt:
        console.print(audit.doubt, style="yellow", markup=False)
    console.print(f"Thresholds: {thresholds_line(audit)}.", style="dim", markup=False)
    document = as_document(audit)
    console.print(f"\n{reasons_title(document)}:")
    for number, reason in enumerate(audit.reasons, 1):
        console.print(f"{number}. {reason}", markup=False)
    if line := above_line(document):
        console.print(f"\n{line}", markup=False)
    console.print()
    console.print(_table(audit))
    for why, found in by_why_not(document["findings"]).items():
        console.print(f"\nMeasured, but does not judge, as {why}:", markup=False)
        _print_reasons(console, found)
    if untested := [each for each in document["findings"] if each["level"] == NOT_TESTED]:
        console.print("\nNot tested:")
        _print_reasons(console, untested)
    if audit.left_out:
        console.print(f"\nLeft out: {', '.join(audit.left_out)}", markup=False)
    console.print(f"\n{RULE}", style="dim", markup=False)
    for file in files:
        console.print(str(file), soft_wrap=True, markup=False)


def _print_reasons(console: Console, findings: list[Mapping[str, Any]]) -> None:
    for each in findings:
        console.print(f"- {each['check']}: {each['reason']}", markup=False)


def _table(audit: Audit) -> Table:
    from backdoorbench_moe.auditing.verdict import SIGNS

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("check", no_wrap=True)
    for column in ("score", "threshold"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for each in audit.findings:
        numbers = [NONE if value is None else f"{value:.2f}" for value in (each.score, each.threshold)]
        level = f"[red]{escape(each.level)}[/red]" if each.level == SIGNS else escape(each.level)
        table.add_row(each.check, *numbers, level, f"{each.seconds:.1f}" if each.score is not None else NONE)
    return table
