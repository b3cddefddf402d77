"""`bbmoe bench export`: write all records of a suite for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo, say


@click.command("export")
@click.argument("name", metavar="SUITE")
@click.option("--scale", metavar="NAME", help="Scale of the suite.  [the first]")
@click.option("--repeats", type=int, metavar="N", help="Seeds per cell.  [the suite's]")
@click.option(
    "--output",
    type=PATH,
    default=Path("runs"),
    show_default=True,
    help="Folder that contains the run folders.",
)
@click.option("--csv", "csv_file", metavar="FILE", help="CSV file, one row per run; - for standard output.")
@click.option(
    "--jsonl",
    "jsonl_file",
    metavar="FILE",
    help="JSON Lines file, one record per line; - for standard output.",
)
def command(
    name: str,
    scale: str | None,
    repeats: int | None,
    output: Path,
    csv_file: str | None,
    jsonl_file: str | None,
) -> None:
    """Write the records of all finished runs of SUITE, including clean twins, to a CSV or JSON Lines file."""
    from backdoorbench_moe.bench.suites.reading import load_suite
    from backdoorbench_moe.bench.tables.results import ResultSet, record_lines
    from backdoorbench_moe.bench.tables.tidy import tidy_csv
    from backdoorbench_moe.errors import ConfigError

    if csv_file is None and jsonl_file is None:
        raise ConfigError("export: expected --csv or --jsonl, got neither")
    if csv_file == jsonl_file == "-":
        raise ConfigError("export: only one of --csv and --jsonl can be -")
    suite = load_suite(name, scale)
    results = ResultSet.from_runs(suite if repeats is None else suite.with_repeats(repeats), output)
    if csv_file is not None:
        _write(tidy_csv(results), csv_file)
    if jsonl_file is not None:
        _write("".join(f"{line}\n" for line in record_lines(results)), jsonl_file)
    say(f"{len(results.finished())} finished runs of {suite.label}")


def _write(text: str, file: str) -> None:
    from backdoorbench_moe.paths import expand
    from backdoorbench_moe.records import write_atomically

    if file == "-":
        echo(text, nl=False)
    else:
        write_atomically(expand(file), lambda path: path.write_text(text, encoding="utf-8"))
