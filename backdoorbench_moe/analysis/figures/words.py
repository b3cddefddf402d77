"""Numbers as a figure's sentence says them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backdoorbench_moe.analysis.figures.plate import Doc

NONE = "–"


def number(value: Any, form: str = "{:.3g}", factor: float = 1) -> str:
    """A number that may not be there."""
    return NONE if value is None else form.format(factor * value)


def percent(value: Any, digits: int = 1) -> str:
    """A value in percent."""
    return NONE if value is None else f"{value:.{digits}f}%"


def proportion(one: Doc | None) -> str:
    """A proportion in percent, with its 95% interval."""
    return NONE if one is None else f"{percent(one['value'])} [{one['low']:.1f}, {one['high']:.1f}]"


def mean(one: Doc, form: str = "{:.3g}", factor: float = 1) -> str:
    """A mean with its 95% interval, where it has one."""
    text = number(one["value"], form, factor)
    if one["low"] is None:
        return text
    return f"{text} [{number(one['low'], form, factor)}, {number(one['high'], form, factor)}]"


def listing(texts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def capital(text: str) -> str:
    """With a capital at the beginning."""
    return text[:1].upper() + text[1:]


def role(facts: Doc) -> str:
    """What a run's model is, in a word: clean, backdoored or defended."""
    spec = facts["record"]["spec"]
    if spec.get("defenses"):
        return "defended"
    return "clean" if spec["trigger"] is None else "backdoored"


def roles(document: Doc) -> list[str]:
    """The role of the run, then of the one it is compared with; where they are the same, told apart."""
    both = [role(facts) for facts in (document["run"], document["against"]) if facts is not None]
    if len(both) == 2 and both[0] == both[1]:
        return [f"this {both[0]}", f"other {both[1]}"]
    return both
