"""`bbmoe import backdoorbench`: import a result folder of BackdoorBench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoorbench_moe.cli.model_file import normalisation_flags, read_colour
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import chain_options
from backdoorbench_moe.errors import ConfigError

if TYPE_CHECKING:
    from backdoorbench_moe.interop.comparison import Imported


@click.command("backdoorbench")
@click.argument("folder", type=PATH, metavar="FOLDER")
@click.option(
    "--defense",
    metavar="NAME",
    help="Import the defended model in FOLDER/defense/NAME instead of the attacked one.",
)
@click.option("--data-root", metavar="DIR", help="Folder with the clean data set, to measure BA.")
@click.option("--dataset", metavar="NAME", help="Clean data set.  [the one named in the result]")
@click.option(
    "--set", "settings", multiple=True, metavar="dataset.KEY=VALUE", help="An option of the data set."
)
@normalisation_flags("BackdoorBench's for the data set")
@click.option(
    "--output", type=PATH, default=Path("runs"), show_default=True, help="Folder for the run folder."
)
@click.option(
    "--device", metavar="NAME", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    folder: Path,
    defense: str | None,
    data_root: str | None,
    mean: str | None,
    std: str | None,
    dataset: str | None,
    settings: tuple[str, ...],
    output: Path,
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Import the BackdoorBench result in FOLDER, which contains attack_result.pt and the poisoned images, as a run.

    The file is read as data only: no code in it is executed and no path in it is followed. BA, ASR and RA are measured
    and compared with BackdoorBench's own numbers; a difference of more than half a percentage point is an error.
    """
    usage = CoreUsage.now()
    given = chain_options(settings)
    if others := sorted(given.keys() - {"dataset"}):
        raise ConfigError.expected("--set", "dataset.KEY=VALUE", others[0])
    options = given.get("dataset", {})
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.interop.importing import import_backdoorbench
    from backdoorbench_moe.models.common import CommonOptions

    colours = {flag: read_colour(f"--{flag}", text) for flag, text in (("mean", mean), ("std", std))}
    normalisation = CommonOptions(**colours).normalisation  # type: ignore[arg-type]
    use_threads(threads, usage, device)
    imported = import_backdoorbench(
        folder,
        defense=defense,
        dataset=dataset,
        data_options=options,
        data_root=data_root,
        normalisation=normalisation,
        output=output,
        device=device,
        observer=make_observer(quiet=quiet),
    )
    _print(imported, as_json=as_json)


def _print(imported: Imported, *, as_json: bool) -> None:
    from backdoorbench_moe.cli.tables.runs import NONE, print_json
    from backdoorbench_moe.cli.terminal.streams import echo

    if as_json:
        print_json([imported.run])
        return
    echo(f"{'':4} {'here':>8} {'BackdoorBench':>14}")
    for each in imported.compared:
        there = NONE if each.there is None else f"{each.there:.2f}%"
        echo(f"{each.name.upper():4} {each.here:7.2f}% {there:>14}")
    echo(f"run: {imported.run.folder.path}")
