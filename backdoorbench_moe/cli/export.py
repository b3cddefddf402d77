"""`bbmoe export`: the training set and the weights of a run as plain files, or as the folder of another tool."""

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
    help="Class folders of PNG files with a table; one safetensors file; BackdoorBench's folder; or a checkpoint.",
)  # fmt: skip
@click.option("--weights-only", is_flag=True, help="Leave out the training set.")
@click.option("--data-root", metavar="DIR", help="Folder of the data set.  [the one of RUN]")
def command(*, run: Path, folder: Path, form: str, weights_only: bool, data_root: str | None) -> None:
    """Write the training set of the finished run in folder RUN, as its victim had it, and its weights to DIR.

    DIR must not exist or be empty. With PNG files, train/CLASS/INDEX.png lies in the folder of the label that the
    victim had, and train.csv has for every image its label, its original label and its group: clean, poison, cover or
    noise. train.safetensors has the same as tensors. model.safetensors is the state dict; its header says whether the
    model is backdoored. Nobody should deploy such a model.

    BackdoorBench's folder has the poisoned images as PNG files, the numbers as csv and the weights. No pickle is
    written: its users run the script in DIR to make it.

    The checkpoint, --format transformers, is that of a language model, with its tokenizer; no texts are written.
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
