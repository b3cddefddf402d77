"""Names of the kinds of parts in help texts."""

from __future__ import annotations

from backdoorbench_moe.kinds import KINDS

# Kinds that are spelled differently in texts and on the command line.
IN_TEXTS = {"dataset": "data set"}


def _join(names: list[str], word: str) -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


# "triggers, applicators, ... and data sets"
ALL_KINDS = _join([f"{IN_TEXTS.get(name, name)}s" for name in KINDS], "and")
# "trigger, applicator, ... or dataset", as they are given on the command line
ONE_KIND = _join(list(KINDS), "or")
