"""`bbmoe import FILE`: from a file of weights to a run folder."""

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
@click.option("--data-root", metavar="DIR", help="Folder of the data set.")
@click.option("--download", is_flag=True, default=None, help="Download the data set if it is missing.")
@click.option("--recipe", metavar="NAME", help="quick or paper: how defenses tune the model.  [quick]")
@click.option("--seed", type=int, metavar="N", help="[0]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--precision", metavar="KIND", help="auto, fp32 or bf16.  [auto]")
@click.option("--config", type=PATH, metavar="FILE", help="YAML with any of these values.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any value, by dotted key.")
@click.option("--output", type=PATH, default=Path("runs"), show_default=True, help="Folder of run folders.")
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
    """Make a run folder of the model in FILE, measured on clean test images.

    FILE is a safetensors file, or a state dict that torch.save wrote; it is read without running anything in it. Names
    and shapes must be those of the model, and the data must have its classes, in its order. Whether the model is
    backdoored is not known: the run can be analysed and defended, without a trigger.

    Normalisation and resizing are inside the model from then on. A warning says so if another usual normalisation gives
    a clearly higher accuracy.
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
