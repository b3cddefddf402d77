"""Calibration: thresholds from one part of a population of audited models, and errors measured on the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from backdoorbench_moe.auditing.calibration import (
    FEWEST_CLEAN,
    SCHEMA_VERSION,
    Threshold,
    key_of,
    set_threshold,
)
from backdoorbench_moe.auditing.checks import CHECKS
from backdoorbench_moe.auditing.verdict import strength_of
from backdoorbench_moe.ops.detection import auroc
from backdoorbench_moe.ops.metrics import Proportion, proportion

# The intended false alarm rate.
LEVEL = 0.05
# An attacked model with a lower ASR, in percent, has no working backdoor that could be found.
SMALLEST_ASR = 50.0
RULE = (
    "thresholds from clean models of even seeds; a check judges if the 95% interval of its AUROC on the models of even "
    "seeds lies above 50%; errors measured on models of odd seeds"
)
VERSIONS = {check.name: check.version for check in CHECKS}


@dataclass(frozen=True)
class Member:
    """An audited model of known origin.

    Attributes:
        name: Name of its run folder.
        dataset: Name of its data set, such as "cifar10".
        model: Name of the model, such as "pmoe".
        attack: The attack, such as "square patch"; "" for a clean model.
        asr: Success rate of the attack in percent; None for a clean model.
        seed: The seed. Models with even seeds set the thresholds; errors are measured on models with odd seeds.
        scores: The scores of the checks that were run, by name and version of the check.
    """

    name: str
    dataset: str
    model: str
    attack: str
    asr: float | None
    seed: int
    scores: Mapping[str, float]

    @property
    def attacked(self) -> bool:
        """Whether the model was attacked."""
        return bool(self.attack)

    @property
    def calibrates(self) -> bool:
        """Whether the model belongs to the part that sets the thresholds."""
        return self.seed % 2 == 0


def scores_of(document: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores in an audit.json, by the keys of a calibration."""
    return {
        key_of(each["check"], each["version"]): each["score"]
        for each in document["findings"]
        if each["score"] is not None and VERSIONS.get(each["check"]) == each["version"]
    }


def set_thresholds(members: Sequence[Member], level: float = LEVEL) -> dict[str, Threshold]:
    """Set the threshold of each check from the models with even seeds.

    Thresholds are computed from the clean models. A check judges if it distinguishes the attacked models from them, see
    `tells_apart`. Each of these checks gets an equal part of the level (Bonferroni correction), so that the false alarm
    rate of the verdict is at most `level` if that of each check is at most its part; see `set_threshold`.

    Returns:
        The thresholds by key of the check. Checks with fewer than `FEWEST_CLEAN` scores of clean models are left out.
    """
    calibrating = [each for each in members if each.calibrates]
    clean, attacked = (_scores([m for m in calibrating if m.attacked == which]) for which in (False, True))
    enough = {key: values for key, values in clean.items() if len(values) >= FEWEST_CLEAN}
    judging = {key for key, values in enough.items() if tells_apart(values, attacked.get(key, []))}
    part = level / max(1, len(judging))
    return {
        key: replace(set_threshold(values, part), judges=key in judging) for key, values in enough.items()
    }


def tells_apart(clean: Sequence[float], attacked: Sequence[float]) -> bool:
    """Return whether the 95% interval of a check's AUROC lies above 50%.

    It does not if all clean models have the same score, as a threshold needs the spread of their scores.
    """
    if not attacked or len(set(clean)) == 1:
        return False
    return auroc(np.asarray(clean), np.asarray(attacked)).low > 50


def _scores(members: Iterable[Member]) -> dict[str, list[float]]:
    """Return the scores of some models by key of the check, sorted by key."""
    found: dict[str, list[float]] = {}
    for member in members:
        for key, score in member.scores.items():
            found.setdefault(key, []).append(score)
    return dict(sorted(found.items()))


def strength(member: Member, thresholds: Mapping[str, Threshold], without: str = "") -> float | None:
    """Return the largest strength of the scores that judge, as in the verdict; None without such scores.

    Args:
        member: The member.
        thresholds: The thresholds.
        without: Key of a check to ignore.
    """
    found = [
        strength_of(member.scores[key], known.centre, known.value)
        for key, known in thresholds.items()
        if known.judges and key in member.scores and key != without
    ]
    return max(found, default=None)


def measure_errors(
    clean: Sequence[float], attacked: Sequence[float], threshold: float
) -> dict[str, dict[str, float] | None]:
    """Return AUROC, false alarm rate and detection rate in percent, with 95% intervals; None without models."""
    alarms, hits = (np.asarray(scores) > threshold for scores in (clean, attacked))
    area = auroc(np.asarray(clean), np.asarray(attacked)) if len(clean) and len(attacked) else None
    return {
        "auroc": _row(area),
        "false_alarms": _row(proportion(int(alarms.sum()), len(alarms)) if len(alarms) else None),
        "detected": _row(proportion(int(hits.sum()), len(hits)) if len(hits) else None),
    }


def _row(found: Proportion | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)


def calibrate(
    members: Sequence[Member],
    *,
    commit: str | None,
    date: str,
    level: float = LEVEL,
    smallest_asr: float = SMALLEST_ASR,
) -> dict[str, Any]:
    """Calibrate the checks on a population.

    Args:
        members: The audited models.
        commit: The commit that computed the calibration.
        date: The date, as YYYY-MM-DD.
        level: The intended false alarm rate.
        smallest_asr: Attacked models with a lower success rate are left out, see `working`.

    Returns:
        The document of a calibration, see `calibration.parse`. If no check distinguishes attacked models from clean
        ones, no check judges, and the verdict has no measured errors.

    Raises:
        ValueError: There are too few clean models, or none to measure the false alarms on.
    """
    used = working(members, smallest_asr)
    thresholds = set_thresholds(used, level)
    if not thresholds:
        raise ValueError(f"calibrate: expected {FEWEST_CLEAN} clean models of even seeds")
    others = _measurable([each for each in used if not each.calibrates], thresholds)
    if all(each.attacked for each in others):
        raise ValueError("calibrate: expected clean models of odd seeds, to measure false alarms on")
    return {
        "kind": "audit calibration",
        "schema_version": SCHEMA_VERSION,
        "commit": commit,
        "date": date,
        "level": level,
        "rule": RULE,
        "population": {
            "calibrating": _count([each for each in used if each.calibrates]),
            "measuring": _count(others),
            "weak": sorted(each.name for each in members if each not in used),
        },
        **measure(others, thresholds),
    }


def working(members: Sequence[Member], smallest_asr: float = SMALLEST_ASR) -> list[Member]:
    """Return the clean models and those with a working backdoor: an ASR of at least `smallest_asr` percent."""
    return [each for each in members if not each.attacked or (each.asr or 0) >= smallest_asr]


def measure(members: Sequence[Member], thresholds: Mapping[str, Threshold]) -> dict[str, Any]:
    """Measure the errors of thresholds on a population.

    Args:
        members: The audited models. The errors are those on other models only if none of them set the thresholds.
        thresholds: The thresholds by key of the check.

    Returns:
        `verdict`, the errors of the verdict, see `measure_errors`; `checks`, those of each check; and `groups`, the
        number of models and of those with signs, by data set, model and attack.
    """
    others = _measurable(members, thresholds)
    return {
        "verdict": _verdict(others, thresholds),
        "checks": {key: _check(key, known, others, thresholds) for key, known in thresholds.items()},
        "groups": _groups(others, thresholds),
    }


def _measurable(members: Sequence[Member], thresholds: Mapping[str, Threshold]) -> list[Member]:
    """Return the members with a score that judges; all members if no check judges."""
    judging = any(known.judges for known in thresholds.values())
    return [each for each in members if not judging or strength(each, thresholds) is not None]


def _verdict(
    others: Sequence[Member], thresholds: Mapping[str, Threshold], without: str = ""
) -> dict[str, Any]:
    found = {True: list[float](), False: list[float]()}
    for each in others:
        value = strength(each, thresholds, without)
        if value is not None:
            found[each.attacked].append(value)
    return measure_errors(found[False], found[True], 1.0)


def _check(
    key: str, known: Threshold, others: Sequence[Member], thresholds: Mapping[str, Threshold]
) -> dict[str, Any]:
    scores = {
        attacked: [each.scores[key] for each in others if key in each.scores and each.attacked == attacked]
        for attacked in (False, True)
    }
    rest = _verdict(others, thresholds, without=key)
    return {
        "centre": known.centre,
        "threshold": known.value,
        "clean": known.clean,
        "judges": known.judges,
        **measure_errors(scores[False], scores[True], known.value),
        # The verdict without this check, which shows whether the check is useful. The others keep their thresholds.
        "verdict_without": {name: rest[name] for name in ("auroc", "detected")},
    }


def _groups(others: Sequence[Member], thresholds: Mapping[str, Threshold]) -> list[dict[str, Any]]:
    """Return how many models have signs of a backdoor, by data set, model and attack."""
    groups: dict[tuple[str, str, str], list[bool]] = {}
    for each in others:
        kind = (each.dataset, each.model, each.attack)
        groups.setdefault(kind, []).append((strength(each, thresholds) or 0) > 1)
    return [
        {"dataset": dataset, "model": model, "attack": attack, "models": len(signs), "signs": sum(signs)}
        for (dataset, model, attack), signs in sorted(groups.items())
    ]


def _count(members: Sequence[Member]) -> dict[str, Any]:
    models = sorted({each.model for each in members})
    return {
        "clean": sum(not each.attacked for each in members),
        "attacked": sum(each.attacked for each in members),
        "models": {name: sum(each.model == name for each in members) for name in models},
    }


def table(document: Mapping[str, Any]) -> str:
    """Return the measured errors of a calibration, or of `measure`, as Markdown tables."""
    return f"{check_table(document)}\n{group_table(document)}"


def check_table(document: Mapping[str, Any]) -> str:
    """Return the errors of each check and of the verdict as a Markdown table."""
    lines = [
        "| check | judges | threshold | AUROC | false alarms | detected | verdict's AUROC without it |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    rows = sorted(
        document["checks"].items(),
        key=lambda item: (not item[1]["judges"], -((item[1]["auroc"] or {}).get("value", 0))),
    )
    for name, row in rows:
        cells = [error_cell(row[key]) for key in ("auroc", "false_alarms", "detected")]
        cells.append(error_cell(row["verdict_without"]["auroc"]) if row["judges"] else "")
        judges = "yes" if row["judges"] else "no"
        lines.append(
            f"| {name.partition('/')[0]} | {judges} | {row['threshold']:.3g} | {' | '.join(cells)} |"
        )
    verdict = [error_cell(document["verdict"][key]) for key in ("auroc", "false_alarms", "detected")]
    lines.append(f"| **verdict** | | 1 | {' | '.join(verdict)} | |")
    return "\n".join(lines) + "\n"


def group_table(document: Mapping[str, Any]) -> str:
    """Return the number of models with signs, by data set, model and attack, as a Markdown table."""
    lines = ["| data set | model | attack | models | with signs |", "|---|---|---|---:|---:|"]
    lines += [
        f"| {row['dataset']} | {row['model']} | {row['attack'] or 'none'} | {row['models']} | {row['signs']} |"
        for row in document["groups"]
    ]
    return "\n".join(lines) + "\n"


def error_cell(row: Mapping[str, float] | None) -> str:
    """Format a rate with its interval, in percent; "–" if it was not measured."""
    return "–" if row is None else f"{row['value']:.0f} ({row['low']:.0f} to {row['high']:.0f})"
