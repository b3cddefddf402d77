"""`bbmoe defend`: from a run folder to those of defended runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoorbench_moe.cli.params import PATH
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
    help="What is done; see `bbmoe list defenses`. Several, or all, are compared in one table.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the defense; of several NAME.KEY=VALUE, or KEY=VALUE for all that have it.",
)
@click.option(
    "--output", type=PATH, metavar="DIR", help="Folder of run folders.  [the one that contains RUN]"
)
@click.option("--data-root", metavar="DIR", help="Folder of the data set.  [the one of RUN]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [the run's]")
@threads_option
@click.option(
    "--dry-run", is_flag=True, help="List the defended runs and how long they will take; make none."
)
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of the table of several.  [rich]")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    run: Path,
    names: tuple[str, ...],
    settings: tuple[str, ...],
    threads: int | None,
    device: str | None,
    dry_run: bool,
    form: str | None,
    as_json: bool,
    quiet: bool,
    **place: Any,
) -> None:
    """Defend the model of the finished run in folder RUN; BA, ASR and RA before and after every stage.

    Of a defense that filters inputs: AUROC, true and false positive rate, and BA, ASR and RA behind it.

    The defended model is a run folder of its own, which can be shown and defended again. Interrupted, the
    same command starts over from RUN; finished, it does nothing.

    With several defenses (--defense strip,reroute or --defense all), each is applied to RUN, the dearest last, and one
    table compares them. Plain tuning is added if any of them trains the model. Defenses that cannot be applied to RUN
    are listed with the reason; of a run on texts, --defense all leaves out those for images. Interrupted, the same
    command continues with the first one that is not finished. Exit code 1: a defense failed.
    """
    usage = CoreUsage.now()
    from backdoorbench_moe.bench.running.defense_options import split_names

    split_names(names)  # A wrong name is said at once, without the time that torch takes.
    options = chain_options(settings)
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.engine.run import load_run

    parent = load_run(run)
    defenses = split_names(names, of_texts=parent.record.is_text)
    use_threads(threads, usage, device or parent.spec.device)
    given = {**place, "device": device, "observer": make_observer(quiet=quiet)}
    is_list = len(defenses) > 1 or "all" in names
    if not (is_list or dry_run or form):
        _defend_once(parent, PartSpec(defenses[0], options), as_json=as_json, **given)
        return
    if not is_list:
        options = {defenses[0]: options}
    _defend_each(parent, defenses, options, dry_run=dry_run, form=form, as_json=as_json, quiet=quiet, **given)


def _defend_once(parent: Run, defense: PartSpec, *, as_json: bool, **given: Any) -> None:
    from backdoorbench_moe.cli.tables.runs import print_defended, print_json
    from backdoorbench_moe.engine.runner import run_defense

    defended = run_defense(parent, defense, **given)
    if as_json:
        print_json([defended])
    else:
        print_defended(defended)


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
