"""Flags of the commands that take a file of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.attack import spec_from_flags
from backdoorbench_moe.config import IMPORTED, RunSpec, merge
from backdoorbench_moe.errors import ConfigError


def model_file_options(*, required: bool) -> Callable[[Any], Any]:
    """Add the flags that describe the model of the weights and its input images."""
    options = [
        click.option(
            "--model",
            metavar="NAME",
            required=required,
            help="Model of the weights (see `bbmoe list models`), or timm:<architecture>.",
        ),
        click.option(
            "--weights-key",
            metavar="KEY",
            help="Key of the state dict in a checkpoint, such as state_dict_ema.  [state_dict, model, ...]",
        ),
        *normalisation_options("none"),
        click.option(
            "--resize", type=int, metavar="PX", help="Height and width to which the model resizes its input."
        ),
        click.option(
            "--dataset",
            metavar="NAME",
            help="Data set: signs (built in), cifar10, gtsrb, folder, ...  [signs]",
        ),
        click.option(
            "--image-size",
            type=int,
            metavar="PX",
            help="Resize images of the data set to this height and width.",
        ),
    ]

    return _adding(options)


def normalisation_flags(default: str) -> Callable[[Any], Any]:
    """Add the flags --mean and --std; `default` describes the normalisation without them."""
    return _adding(normalisation_options(default))


def normalisation_options(default: str) -> list[Callable[[Any], Any]]:
    """Return the flags --mean and --std."""
    return [
        click.option(
            "--mean",
            metavar="R,G,B",
            help=f"Normalisation of pixels in [0, 1]: mean, or a name such as imagenet.  [{default}]",
        ),
        click.option(
            "--std", metavar="R,G,B", help="Normalisation: standard deviation; not needed with a name."
        ),
    ]


def _adding(options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Return a decorator that adds options to a command, in their order."""

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def spec_of_file(
    weights: Path, flags: dict[str, Any], settings: tuple[str, ...], config: Path | None = None
) -> RunSpec:
    """Return the spec of a run that imports a file of weights.

    Args:
        weights: The file.
        flags: Values of the flags of `model_file_options` and `cli.attack.FLAGS`, by parameter.
        settings: Values of `--set`.
        config: A YAML file with any of these values.

    Raises:
        ConfigError: A value is not valid, or the spec names an attack.
    """
    chosen = {
        "weights": str(weights),
        "weights_key": flags["weights_key"],
        "mean": read_colour("--mean", flags["mean"]),
        "std": read_colour("--std", flags["std"]),
        "resize": flags["resize"],
    }
    options = {name: value for name, value in chosen.items() if value is not None}
    given = merge({"attack": {"name": IMPORTED}}, {"model": options})
    spec = spec_from_flags(config, settings, flags, given=given)
    if not spec.imported:
        raise ConfigError.expected("attack", f"none, as the model is {IMPORTED}", spec.to_dict()["attack"])
    from backdoorbench_moe.engine.names import check_names

    check_names(spec)
    if not weights.is_dir():  # Checked before the data are read, which may be slow.
        from backdoorbench_moe.engine.weights.reading import check_weights

        check_weights(weights)
    return spec


def read_colour(flag: str, text: str | None) -> str | list[float] | None:
    """Read three numbers separated by commas; any other text is a name, which the model's options check."""
    if text is None or not ("," in text or _is_number(text)):
        return text
    try:
        first, second, third = map(float, text.split(","))
        return [first, second, third]
    except ValueError:
        raise ConfigError.expected(flag, "three numbers such as 0.5,0.5,0.5, or a name", text) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
