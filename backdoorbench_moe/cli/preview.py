"""`bbmoe preview`: draw images with and without a trigger."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoorbench_moe.cli.attack import spec_from_flags, spec_options
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.engine.names import check_names
from backdoorbench_moe.errors import ConfigError

if TYPE_CHECKING:
    from backdoorbench_moe.analysis.preview import Preview


@click.command("preview")
@spec_options
@click.option(
    "--run", type=PATH, metavar="RUN", help="Use the trigger and data of this run, and show its experts."
)
@click.option(
    "--images",
    type=int,
    default=6,
    show_default=True,
    metavar="N",
    help="Number of images, from each class in turn.",
)
@click.option(
    "--split",
    default="test",
    show_default=True,
    metavar="NAME",
    help="Draw images of this split: train or test.",
)
@click.option(
    "--amplify",
    type=float,
    default=5.0,
    show_default=True,
    metavar="X",
    help="Factor by which the difference is amplified.",
)
@click.option("--output", type=PATH, default=Path("preview.png"), show_default=True, metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    *,
    config: Path | None,
    settings: tuple[str, ...],
    run: Path | None,
    images: int,
    split: str,
    amplify: float,
    output: Path,
    as_json: bool,
    **flags: Any,
) -> None:
    """Draw images without and with a trigger, and the amplified difference, to a PNG file.

    For a mixture of experts, further columns show the images as they appear in each task; images of other tasks are
    dimmed. With --run, further columns show which tiles each expert of a routed model selected; the others are dimmed.
    """
    if run is None:
        spec = spec_from_flags(config, settings, flags)
        check_names(spec)
    else:
        _check_alone({**flags, "config": config, "set": settings or None})
    from backdoorbench_moe.analysis import preview as drawing
    from backdoorbench_moe.engine.run import load_run

    drawing.check_output(output, amplify)
    if run is None:
        preview = drawing.preview_spec(spec, images=images, split=split)
    else:
        root = flags["data_root"]
        preview = drawing.preview_run(load_run(run), images=images, split=split, data_root=root)
    drawing.save_preview(preview, output, amplify=amplify)
    if as_json:
        echo(json.dumps(_document(preview, output), indent=2))
    else:
        _print(preview, output)


def _check_alone(flags: dict[str, Any]) -> None:
    """Raise ConfigError if --run is combined with settings that the run's record already has."""
    given = [name for name, value in flags.items() if value is not None and name != "data_root"]
    if given:
        names = [f"--{name.replace('_', '-')}" for name in given]
        raise ConfigError.expected(
            "--run", "no other settings, as the run's record has them", " ".join(names)
        )


def _document(preview: Preview, output: Path) -> dict[str, Any]:
    """Return what is shown as plain values; the PSNR of an unchanged image is None."""
    rows = zip(preview.indices, preview.labels, preview.psnr, preview.ssim, strict=True)
    return {
        "output": str(output),
        "title": preview.title,
        "images": [
            {"index": int(index), "class": label, "psnr": _finite(psnr.item()), "ssim": ssim.item()}
            for index, label, psnr, ssim in rows
        ],
        "mean": {"psnr": _finite(preview.mean_psnr), "ssim": preview.mean_ssim},
        "experts": None if preview.selected is None else preview.selected.shape[1],
        "tasks": list(preview.tasks),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print(preview: Preview, output: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from backdoorbench_moe.analysis.preview import format_psnr

    table = Table("class")
    for column in ("image", "PSNR", "SSIM"):
        table.add_column(column, justify="right")
    for row, label in enumerate(preview.labels):
        quality = format_psnr(preview.psnr[row].item()), f"{preview.ssim[row].item():.3f}"
        table.add_row(escape(label), str(preview.indices[row].item()), *quality)
    table.add_section()
    table.add_row("mean", "", format_psnr(preview.mean_psnr), f"{preview.mean_ssim:.3f}")
    console = Console(highlight=False)
    console.print(preview.title, soft_wrap=True, markup=False)
    console.print(table)
    console.print(f"picture: {output}", soft_wrap=True, markup=False)
