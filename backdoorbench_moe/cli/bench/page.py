"""`bbmoe bench page`: write the results of several suites to one page that can be sorted and filtered."""

from __future__ import annotations

from pathlib import Path

import click

from backdoorbench_moe.cli.pages import save_page
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo, say

DEFAULT_OUTPUT = Path("runs")


@click.command("page")
@click.argument("names", metavar="SUITE...", nargs=-1, required=True)
@click.option(
    "--repeats", type=int, metavar="N", help="Seeds per cell.  [each suite's; with --from, each folder's]"
)
@click.option(
    "--output",
    type=PATH,
    default=DEFAULT_OUTPUT,
    show_default=True,
    help="Folder that contains the run folders.",
)
@click.option(
    "--from",
    "folders",
    type=PATH,
    metavar="DIR",
    help="Read the results folders DIR/SUITE/SCALE instead of run folders.",
)
@click.option(
    "--published",
    metavar="URL",
    help="URL at which the folder of --from is published, for links to records.  [relative paths]",
)
@click.option("--save", type=PATH, metavar="FILE", help="Write the page to FILE instead of printing it.")
def command(
    names: tuple[str, ...],
    repeats: int | None,
    output: Path,
    folders: Path | None,
    published: str | None,
    save: Path | None,
) -> None:
    """Write a leaderboard of each SUITE (SUITE, SUITE:SCALE or a file) to one HTML page.

    For each attack, defense and model, it shows ASR, the target rate without a trigger, BA, RA and AUROC, with
    confidence intervals and links to the records; the differences from plain fine-tuning; and the false alarms of
    detectors on clean models. Nothing is trained: unfinished runs are shown as missing.
    """
    from backdoorbench_moe.bench.pages.found import relative_link
    from backdoorbench_moe.bench.pages.leaderboard import open_board, results_folder
    from backdoorbench_moe.bench.pages.leaderboard_page import leaderboard_page
    from backdoorbench_moe.bench.suites.reading import load_suite, split_scale
    from backdoorbench_moe.bench.tables.results import with_seeds
    from backdoorbench_moe.errors import ConfigError, RecordError

    if published is not None and folders is None:
        raise ConfigError("--published: can only be used with --from")
    if folders is not None and not folders.is_dir():
        raise RecordError(f"--from {folders}: expected a folder of results folders, found none")
    given = [split_scale(text) for text in names]
    suites = [load_suite(name, scale) for name, scale in given]
    places = [None if folders is None else results_folder(suite, folders) for suite in suites]
    suites = [with_seeds(suite, repeats, place) for suite, place in zip(suites, places, strict=True)]
    board = open_board(suites, runs=output, folders=folders)
    start = Path.cwd() if save is None else save.parent
    options = {
        "repeats": repeats,
        "output": output if folders is None and output != DEFAULT_OUTPUT else None,
        "from": folders,
        "published": published,
        "save": save,
    }
    link = relative_link(start, published, folders)
    page = leaderboard_page(board, [name for name, _ in given], link, options)
    if save is None:
        echo(page)
        return
    save_page(page, save)
    say(f"page: {save}")
