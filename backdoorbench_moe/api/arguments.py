"""Argument types of the API functions, and their conversion."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backdoorbench_moe.engine import runner
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.options import convert
from backdoorbench_moe.paths import expand

# The name of a part, or a dict with its "name" and options.
Part = str | Mapping[str, Any]
PathLike = str | os.PathLike[str]


def needed_images(images: Any) -> Any:
    """Return the images, which a module requires. Raises ConfigError if they are None."""
    if images is None:
        raise ConfigError.expected("images", "clean images, as the model is a module", None)
    return images


def opened_run(run: Run | PathLike, parameter: str) -> Run:
    """Return a run, opening it if its folder is given."""
    if isinstance(run, Run):
        return run
    if isinstance(run, list | tuple) and run and all(isinstance(one, Run) for one in run):
        raise ConfigError(
            f"{parameter}: expected one Run, got a list of {len(run)}; attack() returns one run per seed: "
            "[run] = attack(...)"
        )
    return runner.load_run(
        path_of(run, parameter, "a Run (from attack or load_run) or the path of its folder")
    )


def path_of(value: object, parameter: str, expected: str = "a path") -> Path:
    """Return a path. Raises ConfigError for anything else."""
    if isinstance(value, str | os.PathLike):
        return expand(value, parameter)
    # Name only the type, as the text of a model or an array may have thousands of lines.
    raise ConfigError(f"{parameter}: expected {expected}, got an object of type {type(value).__name__}")


def path_or_none(value: object, parameter: str) -> Path | None:
    """Return a path, or None for None."""
    return None if value is None else path_of(value, parameter)


def names_of(value: object, parameter: str) -> tuple[str, ...]:
    """Return names as a tuple; a single name may be given without a list.

    Raises:
        ConfigError: The value is neither a string nor a list of strings.
    """
    names: tuple[str, ...] = convert(
        (value,) if isinstance(value, str) else value, tuple[str, ...], parameter
    )
    return names


def text_or_none(value: object, parameter: str) -> str | None:
    """Return a path as a string, or None for None."""
    return None if value is None else str(path_of(value, parameter))
