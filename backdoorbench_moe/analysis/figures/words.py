"""Formats numbers and names for the captions of figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backdoorbench_moe.analysis.figures.plate import Doc

NONE = "–"


def number(value: Any, form: str = "{:.3g}", factor: float = 1) -> str:
    """Format a number multiplied by a factor; NONE for None."""
    return NONE if value is None else form.format(factor * value)


def percent(value: Any, digits: int = 1) -> str:
    """Format a value in percent; NONE for None."""
    return NONE if value is None else f"{value:.{digits}f}%"


def proportion(one: Doc | None) -> str:
    """Format a proportion in percent with its 95% interval; NONE for None."""
    return NONE if one is None else f"{percent(one['value'])} [{one['low']:.1f}, {one['high']:.1f}]"


def mean(one: Doc, form: str = "{:.3g}", factor: float = 1) -> str:
    """Format a mean multiplied by a factor, with its 95% interval if it has one."""
    text = number(one["value"], form, factor)
    if one["low"] is None:
        return text
    return f"{text} [{number(one['low'], form, factor)}, {number(one['high'], form, factor)}]"


def listing(texts: Sequence[str]) -> str:
    """Join texts as "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def short(text: str, most: int = 16) -> str:
    """Shorten a text to at most `most` characters, with an ellipsis at the end."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def is_text(document: Doc) -> bool:
    """Return whether the data of the analyzed run are texts."""
    return "vocabulary" in document["run"]["record"]["data"]


def inputs(document: Doc) -> str:
    """Return what the inputs of the model are: "images" or "texts"."""
    return "texts" if is_text(document) else "images"


def marked_inputs(document: Doc) -> str:
    """Return the inputs that attacks on experts target: "marked images", or "harmful queries" for texts."""
    return "harmful queries" if is_text(document) else "marked images"


def role(facts: Doc) -> str:
    """Return the role of a run's model: "clean", "backdoored", "imported" or "defended"."""
    if facts["record"]["spec"].get("defenses"):
        return "defended"
    if facts["attacked"] is None:
        return "imported"
    return "backdoored" if facts["attacked"] else "clean"


def roles(document: Doc) -> list[str]:
    """Return the role of the run and, if there is one, of the other run, with "this" and "other" if they are equal."""
    both = [role(facts) for facts in (document["run"], document["against"]) if facts is not None]
    if len(both) == 2 and both[0] == both[1]:
        return [f"this {both[0]}", f"other {both[1]}"]
    return both
