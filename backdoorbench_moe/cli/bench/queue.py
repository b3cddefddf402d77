"""`bbmoe bench queue`: run several suites, one after the other, within a time budget."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoorbench_moe.cli.bench.run import FAILED, UNFINISHED
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.threads import CoreUsage, warn_of_busy_cores
from backdoorbench_moe.process.cores import MOST_THREADS

if TYPE_CHECKING:
    from backdoorbench_moe.bench.running.queue import Entry, Progress


@click.command("queue")
@click.argument("file", type=PATH, metavar="FILE")
@click.option(
    "--workers", type=int, metavar="N", help="Number of parallel runs.  [1; on GPUs, as many as fit]"
)
@click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    metavar="N",
    help="CPU threads per run.  [its share of the cores]",
)
@click.option("--budget", metavar="TIME", help="Stop after this time, such as 90s, 9m or 1h30m.")
@click.option(
    "--nice",
    type=click.IntRange(0, 19),
    default=10,
    show_default=True,
    help="Niceness to add, so that other programs take priority.",
)
@click.option("--dry-run", is_flag=True, help="List the entries and the estimated time; train nothing.")
@click.option(
    "--output",
    type=PATH,
    default=Path("runs"),
    show_default=True,
    help="Folder that contains the run folders.",
)
@click.option(
    "--results",
    type=PATH,
    default=Path("benchmarks/results"),
    show_default=True,
    help="Folder of results folders: their runs count as finished, and new results are saved there.",
)
@click.option("--data-root", metavar="DIR", help="Folder with the data set, for data sets that need one.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    file: Path,
    workers: int | None,
    threads: int | None,
    budget: str | None,
    nice: int,
    dry_run: bool,
    output: Path,
    results: Path,
    data_root: str | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Run the unfinished runs of the suites listed in FILE, in this order, and save their records and tables.

    FILE is a YAML file with a list under the key `queue`. Each entry has a `suite`, and optionally its `scale`, the
    number of seeds (`repeats`) and filters of cells (`only`). Runs whose records are in a results folder are skipped.
    After each entry, the results folder RESULTS/SUITE/SCALE is written. Repeat the command to continue.

    Exit code 1: a run failed; 2: the command or a file is not valid; 3: the time budget was used up.
    """
    usage = CoreUsage.now()
    from backdoorbench_moe.bench.running.engines import make_engine
    from backdoorbench_moe.bench.running.engines.local import LocalEngine
    from backdoorbench_moe.bench.running.queue import read_queue, work_off
    from backdoorbench_moe.cli.bench.display import make_display
    from backdoorbench_moe.durations import parse_budget

    seconds = None if budget is None else parse_budget(budget)
    entries = read_queue(file)
    engine = make_engine(workers=workers, device=device, threads=threads)  # Refuses its options.
    if dry_run:
        _print_plan(entries, output, results, data_root, device, usage, quiet=quiet)
        return
    if isinstance(engine, LocalEngine) and not engine.gpus and threads is None:
        warn_of_busy_cores(engine.workers * engine.threads_each, usage)
    os.nice(nice)  # Inherited by the processes of the engine.
    done = work_off(
        entries,
        engine,
        output=output,
        results=results,
        watch=lambda suite, known: make_display(suite, output, known, quiet=quiet),
        budget=seconds,
        root=data_root,
        device=device,
    )
    _conclude(list(done))


def _conclude(done: list[Progress]) -> None:
    """Print a line for each entry, and exit with the code of the command."""
    from rich.console import Console
    from rich.table import Table

    table = Table("entry", "runs", "finished now", "failed", "left", "saved in", box=None, pad_edge=False)
    for each in done:
        report = each.report
        made = report.count("finished")
        left = report.total - report.found - made - report.count("found") - len(report.failed)
        numbers = map(str, (report.total, made, len(report.failed), left))
        table.add_row(each.entry.label, *numbers, str(each.saved or "–"))
    Console(highlight=False).print(table)
    if any(each.report.failed for each in done):
        sys.exit(FAILED)
    if not all(each.report.is_complete for each in done):
        sys.exit(UNFINISHED)


def _print_plan(
    entries: list[Entry],
    output: Path,
    results: Path,
    root: str | None,
    device: str | None,
    usage: CoreUsage,
    *,
    quiet: bool,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from backdoorbench_moe.bench.running.plan import read_plan
    from backdoorbench_moe.bench.running.queue import check_folders, read_results
    from backdoorbench_moe.bench.running.run import check, estimate
    from backdoorbench_moe.bench.suites.suite import order
    from backdoorbench_moe.cli.tables.plan import PlanProgress, time_left, total_line

    known, plans, checked = read_results(results), {}, set[str]()
    check_folders(entries, results)
    with PlanProgress(quiet=quiet) as progress:
        for entry in entries:
            suite = entry.placed(root, device)
            runs = read_plan(list(order(suite)), output, known)
            left = {run.spec.digest: run.spec for run in runs if run.status != "finished"}
            unchecked = [spec for digest, spec in left.items() if digest not in checked]
            check(suite, unchecked, output, progress.on_check)
            checked |= left.keys()
            plans[entry.label] = runs
        # A run that several entries share counts in the first. Each kind of run is timed once for all entries.
        union = {run.spec.digest: run for runs in reversed(plans.values()) for run in runs}
        seconds = {run.spec.digest: left for run, left in estimate(list(union.values()), progress.on_time)}
    table, seen = Table("entry", "runs", "finished", "time left", box=None, pad_edge=False), set[str]()
    for label, runs in plans.items():
        own = [(run, seconds[run.spec.digest]) for run in runs if run.spec.digest not in seen]
        seen |= {run.spec.digest for run, _ in own}
        finished = sum(run.status == "finished" for run, _ in own)
        table.add_row(label, str(len(own)), str(finished), time_left(own))
    console = Console(highlight=False)
    console.print(table)
    console.print(total_line([(run, seconds[run.spec.digest]) for run in union.values()], usage))
