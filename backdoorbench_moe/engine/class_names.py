"""Replace class names in a spec by class numbers, once the classes of the data are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from backdoorbench_moe.config import PoisonSpec, RunSpec
from backdoorbench_moe.errors import BbmoeWarning, UnknownNameError


def resolve_classes(spec: RunSpec, class_names: Callable[[], Sequence[str]]) -> RunSpec:
    """Return the spec with class numbers instead of names, so that its digest does not depend on which are given.

    Args:
        spec: `poison.target` and `poison.source` may contain names. If no class has exactly this name, case is ignored,
            provided that only one class then matches.
        class_names: Returns the names of the classes, by number; called only if the spec contains a name.

    Raises:
        UnknownNameError: No class has this name; the message suggests similar ones.
        ConfigError: `poison.source` contains a class twice, once by name.
    """
    poison = spec.poison
    if not any(isinstance(label, str) for label in (poison.target, *poison.source)):
        return spec
    classes = class_names()
    target = _number("poison.target", poison.target, classes)
    source = tuple(_number("poison.source", label, classes) for label in poison.source)
    return replace(spec, poison=replace(poison, target=target, source=source))


def warn_of_numeric_names(poison: PoisonSpec, classes: Sequence[str]) -> None:
    """Warn if a class number is also the name of another class, as with folders named 1 to 10."""
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
    """Describe the target class, and the source classes if there are any, by number and name."""
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
