"""Classes given by name: replaced by their numbers as soon as the data's classes are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from backdoorbench_moe.config import PoisonSpec, RunSpec
from backdoorbench_moe.errors import BbmoeWarning, UnknownNameError


def resolve_classes(spec: RunSpec, class_names: Callable[[], Sequence[str]]) -> RunSpec:
    """Return the spec with every class by its number, so that it has the digest of the same run given by numbers.

    Args:
        spec: `poison.target` and `poison.source` may hold names. A name is taken as it is written, or, where no class
            has it, without regard to case if that leaves one.
        class_names: Gives the data's classes in order; called only if the spec names one.

    Raises:
        UnknownNameError: No class has such a name; the message suggests near ones.
        ConfigError: `poison.source` holds a class twice, once by name.
    """
    poison = spec.poison
    if not any(isinstance(label, str) for label in (poison.target, *poison.source)):
        return spec
    classes = class_names()
    target = _number("poison.target", poison.target, classes)
    source = tuple(_number("poison.source", label, classes) for label in poison.source)
    return replace(spec, poison=replace(poison, target=target, source=source))


def warn_of_numeric_names(poison: PoisonSpec, classes: Sequence[str]) -> None:
    """Warn where a class number could be taken for the name of another class, as with folders named 1 to 10."""
    named = [("poison.target", poison.target), *(("poison.source", label) for label in poison.source)]
    for parameter, label in named:
        name = str(label)
        if name in classes and classes.index(name) != label:
            warnings.warn(
                f"{parameter}: {label} is the number of class {classes[int(label)]!r}; "
                f"the class named {name!r} has number {classes.index(name)}",
                BbmoeWarning,
                stacklevel=2,
            )


def describe_poison(poison: PoisonSpec, classes: Sequence[str]) -> str:
    """Return the target, and the sources if some are named, by number and name."""
    parts = []
    if poison.mapping == "all-to-one":
        parts.append(f"target: {poison.target} ({classes[int(poison.target)]})")
    else:
        parts.append("target: the class after an image's own")
    if poison.source:
        named = (f"{label} ({classes[int(label)]})" for label in poison.source)
        parts.append(f"source: {', '.join(named)}")
    return "; ".join(parts)


def _number(parameter: str, label: int | str, classes: Sequence[str]) -> int:
    if not isinstance(label, str):
        return label
    if label in classes:
        return classes.index(label)
    folded = [number for number, name in enumerate(classes) if name.casefold() == label.casefold()]
    if len(folded) == 1:
        return folded[0]
    raise UnknownNameError(f"{parameter}: class", label, classes, "; or its number")
