"""Several defenses of one run: their estimated time, and the table that compares them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.cli.tables.plan import plan_document, plan_table, total_line
from backdoorbench_moe.cli.terminal.streams import echo, say
from backdoorbench_moe.cli.terminal.threads import CoreUsage

if TYPE_CHECKING:
    from backdoorbench_moe.bench.running.defended import Defended, DefensePlan

# Formats that have no place for reasons below the table; they are printed to standard error.
BARE = ("csv", "latex", "html")


def print_estimate(plan: DefensePlan, *, as_json: bool) -> None:
    """Print the defended runs, their estimated times, and the defenses that cannot be applied."""
    from rich.console import Console

    usage = CoreUsage.now()
    planned = plan.estimate()
    if as_json:
        echo(json.dumps({**plan_document(planned), "not_applicable": dict(plan.refused)}, indent=2))
        return
    console = Console(highlight=False)
    console.print(plan_table(planned))
    for line in _refused_lines(plan):
        console.print(line, markup=False)
    console.print(total_line(planned, usage))


def say_estimate(plan: DefensePlan) -> None:
    """Print the runs and their estimated times to standard error if any run is missing."""
    from rich.console import Console

    usage = CoreUsage.now()
    planned = plan.estimate()
    if any(run.status != "finished" for run, _ in planned):
        console = Console(stderr=True, highlight=False)
        console.print(plan_table(planned))
        console.print(total_line(planned, usage))


def say_progress(made: Defended, number: int, total: int, error: str | None) -> None:
    """Print to standard error that one of several defenses has finished, or why it failed."""
    say(f"defense {number} of {total}: {made.part.name}{' failed: ' + error if error else ''}")


def print_compared(plan: DefensePlan, failed: Mapping[str, str], *, form: str) -> None:
    """Print the table of the run and its defended runs.

    Args:
        plan: The finished plan.
        failed: Error message of each failed defense, by name.
        form: "rich", "markdown", "csv", "latex", "html" or "json".
    """
    from backdoorbench_moe.bench.tables import render
    from backdoorbench_moe.bench.tables.layout import build_sheet

    if form == "json":
        _print_json(plan, failed)
        return
    results = plan.results()
    lines = [*_refused_lines(plan), *(f"failed: {name}: {reason}" for name, reason in failed.items())]
    if form == "rich":
        from rich.console import Console

        console = Console(highlight=False)
        console.print(render.rich_tables(results))
        for line in lines:
            console.print(line, markup=False)
        console.print(f"run folders: {plan.runner.output}", soft_wrap=True, markup=False)
        return
    if form == "markdown":
        echo(render.markdown(build_sheet(results)))
        for line in lines:
            echo(f"- {render.plain(line)}")
    elif form == "csv":
        echo(render.statistics_csv(results), nl=False)
    elif form == "latex":
        echo(render.latex(build_sheet(results)))
    else:
        from backdoorbench_moe.bench.pages.page import page

        again = _command(plan)
        echo(page(results, again=[again, f"{again} --format html > page.html"]))
    if form in BARE:
        for line in lines:
            say(line)


def _refused_lines(plan: DefensePlan) -> Iterator[str]:
    return (f"not applicable: {name}: {reason}" for name, reason in plan.refused.items())


def _command(plan: DefensePlan) -> str:
    """Return the command that runs a plan."""
    names = ",".join(dict.fromkeys(each.part.name for each in plan.runs))
    settings = [
        f" --set {shlex.quote(f'{each.part.name}.{key}={_written(value)}')}"
        for each in plan.runs
        for key, value in each.part.options.items()
    ]
    return f"bbmoe defend {shlex.quote(str(plan.parent.folder.path))} --defense {names}{''.join(settings)}"


def _written(value: Any) -> str:
    """Return an option's value as `--set` reads it: a string unchanged, anything else as JSON, which is also YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _print_json(plan: DefensePlan, failed: Mapping[str, str]) -> None:
    """Print the finished records, by increasing cost, and why others are missing, as one JSON document."""
    results = plan.results()
    runs = [
        {"folder": str(plan.runner.output / each.spec.name), **record.to_dict()}
        for each in plan.runs
        if (record := results.record(each.spec)) is not None
    ]
    document = {"runs": runs, "not_applicable": dict(plan.refused), "failed": dict(failed)}
    echo(json.dumps(document, indent=2))
