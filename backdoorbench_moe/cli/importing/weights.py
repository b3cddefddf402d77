"""`bbmoe import FILE`: import a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.model_file import model_file_options, spec_of_file
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads


@click.command("weights")
@click.argument("weights", type=PATH, metavar="FILE")
@model_file_options(required=True)
@click.option("--data-root", metavar="DIR", help="Folder with the data set.")
@click.option("--download", is_flag=True, default=None, help="Download the data set if it is missing.")
@click.option(
    "--recipe", metavar="NAME", help="Settings with which defenses tune the model: quick or paper.  [quick]"
)
@click.option("--seed", type=int, metavar="N", help="Random seed.  [0]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--precision", metavar="KIND", help="auto, fp32 or bf16.  [auto]")
@click.option("--config", type=PATH, metavar="FILE", help="YAML file with settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, such as model.width=8."
)
@click.option(
    "--output", type=PATH, default=Path("runs"), show_default=True, help="Folder for the run folder."
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    weights: Path,
    config: Path | None,
    settings: tuple[str, ...],
    output: Path,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Import the model weights in FILE as a run, evaluated on clean test images.

    FILE is a safetensors file, or a state dict saved with torch.save; no code in it is executed. The names and shapes
    of its tensors must match the model, and the data set must have the model's classes in the same order. The run can
    be analysed and defended; as it is not known whether the model is backdoored, no trigger is used.

    Normalisation and resizing become part of the imported model. If another common normalisation gives a clearly higher
    accuracy, a warning is printed.
    """
    usage = CoreUsage.now()
    spec = spec_of_file(weights, flags, settings, config)
    use_threads(threads, usage, spec.device)
    from backdoorbench_moe.cli.tables.runs import print_json, print_runs
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.engine.runner import run_import

    run = run_import(spec, output=output, observer=make_observer(quiet=quiet))
    if as_json:
        print_json([run])
    else:
        print_runs([run])
