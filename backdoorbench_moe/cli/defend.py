"""`bbmoe defend`: apply defenses to a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import say
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import PartSpec, Values, chain_options

if TYPE_CHECKING:
    from backdoorbench_moe.engine.run import Run

FORMATS = ("rich", "markdown", "csv", "latex", "html")


@click.command("defend")
@click.argument("run", type=PATH, metavar="RUN")
@click.option(
    "--defense",
    "names",
    required=True,
    multiple=True,
    metavar="NAME,..",
    help="Defenses to apply, or all; see `bbmoe list defenses`. Several are compared in one table.",
)
@click.option(
    "--skip", multiple=True, metavar="NAME,..", help="Defenses to leave out, such as those of --defense all."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the defense. With several: NAME.KEY=VALUE for one, KEY=VALUE for all that have it.",
)
@click.option(
    "--output", type=PATH, metavar="DIR", help="Folder for the new run folders.  [the one that contains RUN]"
)
@click.option("--data-root", metavar="DIR", help="Folder with the data set.  [that of RUN]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [the run's]")
@threads_option
@click.option("--dry-run", is_flag=True, help="List the defended runs and the estimated time; run nothing.")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="Format of the table for several defenses.  [rich]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    run: Path,
    names: tuple[str, ...],
    skip: tuple[str, ...],
    settings: tuple[str, ...],
    threads: int | None,
    device: str | None,
    dry_run: bool,
    form: str | None,
    as_json: bool,
    quiet: bool,
    **place: Any,
) -> None:
    """Apply defenses to the model of the finished run in folder RUN, and evaluate the result.

    Prints BA, ASR and RA (accuracy on triggered images) before the defense and after each of its stages. For a defense
    that filters inputs, also prints its AUROC and its true and false positive rates; its BA, ASR and RA are those of
    the model behind the filter.

    The defended model is written to a new run folder, which can be shown and defended again. An interrupted defense
    starts over if the command is repeated; a finished one is reused.

    With several defenses (--defense strip,reroute or --defense all), each is applied to RUN separately, the most
    expensive last, and one table compares them. If any of them trains the model, plain fine-tuning is added as a
    baseline. Defenses that cannot be applied to RUN are listed with the reason; for a run on texts, --defense all
    leaves out the defenses for images. If the command is repeated after an interruption, finished defenses are skipped.
    Exit code 1: a defense failed.
    """
    usage = CoreUsage.now()
    from backdoorbench_moe.bench.running.defense_options import names_defense, options_by_name, split_names

    split_names(names, skip)  # Report wrong names before torch is imported, which is slow.
    options = chain_options(settings)
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.engine.run import load_run

    parent = load_run(run)
    defenses = split_names(names, skip, of_texts=parent.record.is_text)
    use_threads(threads, usage, device or parent.spec.device)
    given = {**place, "device": device, "observer": make_observer(quiet=quiet)}
    # Also a list of which --skip leaves one.
    is_list = len(split_names(names)) > 1 or "all" in names
    if not is_list and any(map(names_defense, options)):
        options = dict(options_by_name(defenses, options).get(defenses[0], {}))
    if not (is_list or dry_run or form):
        _defend_once(parent, PartSpec(defenses[0], options), as_json=as_json, quiet=quiet, **given)
        return
    if not is_list:
        options = {defenses[0]: options}
    _defend_each(parent, defenses, options, dry_run=dry_run, form=form, as_json=as_json, quiet=quiet, **given)


def _defend_once(parent: Run, defense: PartSpec, *, as_json: bool, quiet: bool, **given: Any) -> None:
    from backdoorbench_moe.bench.tables.tuning import PLAIN_TUNING, tuning_epochs
    from backdoorbench_moe.cli.tables.runs import print_defended, print_json
    from backdoorbench_moe.engine.runner import run_defense

    defended = run_defense(parent, defense, **given)
    if as_json:
        print_json([defended])
        return
    print_defended(defended)
    if not quiet and not parent.record.is_text and defense.name != PLAIN_TUNING and tuning_epochs(defense):
        say(f"to compare with {PLAIN_TUNING} on the same images: the same command with --format rich")


def _defend_each(
    parent: Run,
    names: Sequence[str],
    options: Values,
    *,
    dry_run: bool,
    form: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    from backdoorbench_moe.bench.running.defended import plan_defenses
    from backdoorbench_moe.bench.running.defense_options import options_by_name
    from backdoorbench_moe.cli.tables import defended as defended_table

    plan = plan_defenses(parent, names, options_by_name(names, options), **given)
    if dry_run:
        defended_table.print_estimate(plan, as_json=as_json)
        return
    if not quiet:
        defended_table.say_estimate(plan)
    failed = {}
    for number, (made, error) in enumerate(plan.make(), 1):
        if error is not None:
            failed[made.part.name] = error
        if not quiet:
            defended_table.say_progress(made, number, len(plan.runs), error)
    defended_table.print_compared(plan, failed, form="json" if as_json else form or "rich")
    if failed:
        sys.exit(1)
