"""`bbmoe list`: list all parts, with a description and the package that provides them."""

from __future__ import annotations

import json

import click

from backdoorbench_moe.cli.kind_names import ALL_KINDS
from backdoorbench_moe.cli.terminal.docstring_text import docstring_of, summary
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.plugins import strays

OWN_PACKAGE = "backdoorbench-moe"


HELP = f"""List {ALL_KINDS} (or one KIND), and broken plug-ins.

Parts from plug-in packages are shown with the name of the package. They are imported, to check that they work; built-in
parts are not. `bbmoe info KIND NAME` describes one part in detail.
"""


@click.command("list", help=HELP)
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(kind: str | None, as_json: bool) -> None:
    """List all parts, or those of one kind."""
    kinds = [check_kind(kind)] if kind else list(REGISTRIES)
    rows, faults = [], strays()
    for name in kinds:
        registry = REGISTRIES[name]
        reasons = registry.broken()
        faults += reasons.items()
        for part in registry.names():
            candidate = registry.candidate(part)
            if candidate and candidate not in reasons:
                rows.append(
                    {
                        "kind": name,
                        "name": part,
                        "package": candidate.package,
                        "version": candidate.version,
                        "summary": summary(docstring_of(candidate.target)),
                    }
                )
    broken = [
        {"kind": c.kind, "name": c.name, "package": c.package, "version": c.version, "reason": reason}
        for c, reason in faults
    ]
    if as_json:
        echo(json.dumps({"parts": rows, "broken": broken}, indent=2))
        return
    _print(rows, broken)


def check_kind(kind: str) -> str:
    """Return a kind given in the singular or plural. Raises UnknownNameError."""
    from backdoorbench_moe.errors import UnknownNameError

    if kind.removesuffix("s") not in REGISTRIES:
        raise UnknownNameError("kind", kind, REGISTRIES)
    return kind.removesuffix("s")


def _print(rows: list[dict[str, str]], broken: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("kind", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is")
    last = None
    for row in rows:
        name = "timm:<architecture>" if (row["kind"], row["name"]) == ("model", "timm") else row["name"]
        origin = "" if row["package"] == OWN_PACKAGE else f" ({_origin(row)})"
        table.add_row(row["kind"] if row["kind"] != last else "", name, escape(row["summary"] + origin))
        last = row["kind"]
    console.print(table)
    for row in broken:
        text = f"broken: {row['kind']} {row['name']} ({_origin(row)}): {row['reason']}"
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _origin(row: dict[str, str]) -> str:
    return f"{row['package']} {row['version']}".strip()
