"""`bbmoe bench run`: run the unfinished runs of a suite."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoorbench_moe.cli.bench.options import WITH
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.threads import CoreUsage, warn_of_busy_cores
from backdoorbench_moe.process.cores import MOST_THREADS

if TYPE_CHECKING:
    from backdoorbench_moe.bench.running.engines import Engine
    from backdoorbench_moe.bench.suites.suite import Suite
    from backdoorbench_moe.records import Record

FAILED, UNFINISHED = 1, 3


@click.command("run")
@click.argument("name", metavar="SUITE")
@click.option("--scale", metavar="NAME", help="Scale of the suite.  [the first]")
@click.option(
    "--only",
    "filters",
    multiple=True,
    metavar="KEY=VALUE,..",
    help="Only cells with these settings, by spec key; may be repeated.",
)
@click.option("--repeats", type=int, metavar="N", help="Seeds per cell.  [the suite's]")
@click.option(
    "--workers",
    type=int,
    metavar="N",
    help="Number of parallel runs.  [1; on GPUs or with Ray, as many as fit]",
)
@click.option(
    "--engine", metavar="NAME", default="local", show_default=True, help="Where to run: local or ray."
)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="Address of a running Ray cluster: auto, or HOST:PORT.  [start a local one]",
)
@click.option("--gpus-per-run", type=float, metavar="SHARE", help="Share of a GPU per run, with Ray.")
@click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    metavar="N",
    help="CPU threads per run.  [its share of the cores]",
)
@WITH
@click.option("--budget", metavar="TIME", help="Stop after this time, such as 90s, 9m or 1h30m.")
@click.option("--dry-run", is_flag=True, help="List the runs and the estimated time; train nothing.")
@click.option(
    "--output",
    type=PATH,
    default=Path("runs"),
    show_default=True,
    help="Folder that contains the run folders.",
)
@click.option("--data-root", metavar="DIR", help="Folder with the data set.")
@click.option("--download", is_flag=True, default=None, help="Download the data set if it is missing.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    name: str,
    scale: str | None,
    filters: tuple[str, ...],
    repeats: int | None,
    beside: tuple[Path, ...],
    budget: str | None,
    dry_run: bool,
    output: Path,
    data_root: str | None,
    download: bool | None,
    device: str | None,
    quiet: bool,
    **engine: Any,
) -> None:
    """Run the unfinished runs of SUITE (a name or a file), then print its tables.

    Repeat the command to continue an interrupted suite. If all runs are finished, it trains nothing. A failed run does
    not stop the others.

    Exit code 1: a run failed; 2: the command or the suite is not valid; 3: the time budget was used up.
    """
    usage = CoreUsage.now()
    from backdoorbench_moe.bench.running.plan import with_place
    from backdoorbench_moe.bench.running.run import run_suite
    from backdoorbench_moe.bench.suites.reading import load_suite
    from backdoorbench_moe.bench.tables.results import read_known
    from backdoorbench_moe.durations import parse_budget

    suite = load_suite(name, scale).only(filters)
    suite = suite if repeats is None else suite.with_repeats(repeats)
    given = {"root": data_root, "download": download}
    suite = with_place(suite, {key: value for key, value in given.items() if value is not None}, device)
    seconds = None if budget is None else parse_budget(budget)
    known = read_known(beside)
    maker = _make_engine(device, **engine)  # Refuses its options, before anything is measured.
    if dry_run:
        _print_plan(suite, output, known, usage, quiet=quiet)
        return
    from backdoorbench_moe.bench.running.engines.local import LocalEngine
    from backdoorbench_moe.cli.bench.display import make_display

    if isinstance(maker, LocalEngine) and not maker.gpus and engine["threads"] is None:
        warn_of_busy_cores(maker.workers * maker.threads_each, usage)
    with make_display(suite, output, known, quiet=quiet) as display:
        report = run_suite(
            suite,
            maker,
            output=output,
            budget=seconds,
            known=known,
            on_outcome=display.on_outcome,
            on_check=display.on_check,
        )
    display.conclude(report)
    _print_tables(suite, output, known)
    if report.failed:
        sys.exit(FAILED)
    if not report.is_complete:
        sys.exit(UNFINISHED)


def _make_engine(device: str | None, *, engine: str, **options: Any) -> Engine:
    from backdoorbench_moe.bench.running.engines import make_engine

    return make_engine(engine, device=device, **options)


def _print_plan(
    suite: Suite, output: Path, known: Mapping[str, Record], usage: CoreUsage, *, quiet: bool
) -> None:
    from rich.console import Console

    from backdoorbench_moe.bench.running.plan import read_plan
    from backdoorbench_moe.bench.running.run import check, estimate
    from backdoorbench_moe.bench.suites.suite import order
    from backdoorbench_moe.cli.tables.plan import PlanProgress, plan_table, total_line
    from backdoorbench_moe.paths import check_output

    runs = read_plan(list(order(suite)), output, known)
    missing = [run for run in runs if run.status != "finished"]
    if missing:
        check_output(output, "--output", ())
    with PlanProgress(quiet=quiet) as progress:
        check(suite, [run.spec for run in missing], output, progress.on_check)
        planned = list(estimate(runs, progress.on_time))
    console = Console(highlight=False)
    if not quiet:
        console.print(plan_table(planned))
    console.print(f"{suite.title}", markup=False)
    if suite.note:
        console.print(suite.note, markup=False)
    console.print(total_line(planned, usage))


def _print_tables(suite: Suite, output: Path, known: Mapping[str, Record]) -> None:
    from rich.console import Console

    from backdoorbench_moe.bench.tables import render
    from backdoorbench_moe.bench.tables.results import ResultSet

    Console(highlight=False).print(render.rich_tables(ResultSet.from_runs(suite, output, known)))
