"""`bbmoe import FILE`: from a file of weights to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.attack import spec_from_flags
from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.config import IMPORTED, merge
from backdoorbench_moe.errors import ConfigError


@click.command("weights")
@click.argument("weights", type=PATH, metavar="FILE")
@click.option("--model", metavar="NAME", required=True, help="Model, or timm:<architecture>.")
@click.option("--mean", metavar="R,G,B", help="Normalisation: mean of pixels in [0, 1], or a name.  [none]")
@click.option("--std", metavar="R,G,B", help="Standard deviation; not needed with a name such as imagenet.")
@click.option("--resize", type=int, metavar="PX", help="Side to which the model resizes its images.")
@click.option("--dataset", metavar="NAME", help="signs (embedded), cifar10, gtsrb, folder.  [signs]")
@click.option("--data-root", metavar="DIR", help="Folder of the data set.")
@click.option("--download", is_flag=True, default=None, help="Download the data set if it is missing.")
@click.option("--image-size", type=int, metavar="PX", help="Resize images of the data set to this side.")
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
    mean: str | None,
    std: str | None,
    resize: int | None,
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
    chosen = {
        "weights": str(weights),
        "mean": _colour("--mean", mean),
        "std": _colour("--std", std),
        "resize": resize,
    }
    options = {name: value for name, value in chosen.items() if value is not None}
    given = merge({"attack": {"name": IMPORTED}}, {"model": options})
    spec = spec_from_flags(config, settings, flags, given=given)
    if not spec.imported:
        raise ConfigError.expected("attack", f"none, as the model is {IMPORTED}", spec.to_dict()["attack"])
    from backdoorbench_moe.engine.names import check_names

    check_names(spec)
    use_threads(threads, usage, spec.device)
    from backdoorbench_moe.cli.progress import make_observer
    from backdoorbench_moe.cli.tables import print_json, print_runs
    from backdoorbench_moe.engine.runner import run_import

    run = run_import(spec, output=output, observer=make_observer(quiet=quiet))
    if as_json:
        print_json([run])
    else:
        print_runs([run])


def _colour(flag: str, text: str | None) -> str | list[float] | None:
    """Three numbers, separated by commas, or a name, which the model's options check."""
    if text is None or "," not in text:
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError.expected(flag, "numbers such as 0.5,0.5,0.5, or a name", text) from None
