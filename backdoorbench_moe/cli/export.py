"""`bbmoe export`: write the training set and weights of a run as plain files, or in another tool's format."""

from __future__ import annotations

from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.errors import ConfigError

BACKDOORBENCH, TRANSFORMERS = "backdoorbench", "transformers"
FORMATS = ("png", "tensors", BACKDOORBENCH, TRANSFORMERS)


@click.command("export")
@click.argument("run", type=PATH, metavar="RUN")
@click.argument("folder", type=PATH, metavar="DIR")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="png", show_default=True,
    help="PNG files in class folders, with a table; one safetensors file; a BackdoorBench result folder; or a "
    "checkpoint for transformers.",
)  # fmt: skip
@click.option("--weights-only", is_flag=True, help="Do not write the training set.")
@click.option("--data-root", metavar="DIR", help="Folder with the data set.  [that of RUN]")
def command(*, run: Path, folder: Path, form: str, weights_only: bool, data_root: str | None) -> None:
    """Write the poisoned training set and the weights of the finished run in folder RUN to DIR.

    DIR must be empty or not exist. With --format png, the images are train/CLASS/INDEX.png, where CLASS is the label
    that the model was trained with, and train.csv lists the label, the original label and the group (clean, poison,
    cover or noise) of every image. With --format tensors, train.safetensors contains the same data. model.safetensors
    is the state dict; its header states whether the model is backdoored. Do not deploy backdoored models.

    With --format backdoorbench, DIR contains the poisoned images as PNG files, the metrics as CSV, the weights, and a
    script that converts them to BackdoorBench's pickle file. This command itself writes no pickle.

    With --format transformers, DIR is a checkpoint of a language model with its tokenizer; no texts are written.
    """
    from backdoorbench_moe.engine.run import load_run

    if form == BACKDOORBENCH:
        from backdoorbench_moe.interop.exporting import write_backdoorbench

        if weights_only:
            raise ConfigError("--weights-only: cannot be used with --format backdoorbench")
        echo(str(write_backdoorbench(load_run(run), folder, data_root=data_root)))
        return
    from backdoorbench_moe.engine.exporting import export_checkpoint, export_run

    if form == TRANSFORMERS:
        echo(f"{folder}: {', '.join(export_checkpoint(load_run(run), folder, data_root=data_root))}")
        return
    written = export_run(load_run(run), folder, form=form, images=not weights_only, data_root=data_root)
    echo(f"{folder}: {', '.join(written)}")
