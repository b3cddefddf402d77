"""`bbmoe defend`: from a run folder to that of the defended run."""

from __future__ import annotations

from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import PartSpec, chain_settings


@click.command("defend")
@click.argument("run", type=PATH, metavar="RUN")
@click.option("--defense", required=True, metavar="NAME", help="What is done; see `bbmoe list defenses`.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the defense.")
@click.option(
    "--output", type=PATH, metavar="DIR", help="Folder of run folders.  [the one that contains RUN]"
)
@click.option("--data-root", metavar="DIR", help="Folder of the data set.  [the one of RUN]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [the run's]")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    run: Path,
    defense: str,
    settings: tuple[str, ...],
    output: Path | None,
    data_root: str | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Defend the model of the finished run in folder RUN; BA, ASR and RA before and after every stage.

    Of a defense that filters inputs: AUROC, true and false positive rate, and BA, ASR and RA behind it.

    The defended model is a run folder of its own, which can be shown and defended again. Interrupted, the
    same command starts over from RUN; finished, it does nothing.
    """
    usage = CoreUsage.now()
    from backdoorbench_moe import defenses

    defenses.registry.check_name(defense)
    options = chain_settings(settings)
    from backdoorbench_moe.cli.progress import make_observer
    from backdoorbench_moe.cli.tables import print_defended, print_json
    from backdoorbench_moe.engine.run import load_run
    from backdoorbench_moe.engine.runner import run_defense

    parent = load_run(run)
    use_threads(threads, usage, device or parent.spec.device)
    defended = run_defense(
        parent,
        PartSpec(defense, options),
        output=output,
        data_root=data_root,
        device=device,
        observer=make_observer(quiet=quiet),
    )
    if as_json:
        print_json([defended])
    else:
        print_defended(defended)
