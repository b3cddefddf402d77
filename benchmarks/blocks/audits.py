"""Tables of the population on which the checks of an audit are calibrated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from audit_population import read_scores

from backdoorbench_moe.auditing.calibration import packaged
from backdoorbench_moe.auditing.population import error_cell, measure, set_thresholds, table, working

from .drawing import RESULTS


def audit(root: Path, *, merged: bool) -> str:
    """Draw how well the checks of an audit separate its population: models, or mixtures of merged experts."""
    calibration = packaged(merged=merged)
    assert calibration is not None
    return table(calibration.document)


def audit_transfer(root: Path) -> str:
    """Draw the errors of thresholds from the models of one data set, on the models of each data set."""
    scores = read_scores(root / RESULTS / "audit" / "scores.csv")
    members = working([each for each in scores if each.model != "merged"])
    names = sorted({each.dataset for each in members}, reverse=True)
    lines = [
        "| thresholds from | measured on | clean models | false alarms | attacked models | detected | AUROC |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for source in (*([name] for name in names), names):
        thresholds = set_thresholds([each for each in members if each.dataset in source])
        for name in names:
            others = [each for each in members if each.dataset == name]
            if name in source:
                others = [each for each in others if not each.calibrates]
            cells = _errors(measure(others, thresholds)["verdict"])
            lines.append(f"| {' and '.join(source)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _errors(verdict: dict[str, dict[str, float] | None]) -> list[str]:
    """Return the cells of a verdict's errors."""
    cells = []
    for key in ("false_alarms", "detected"):
        found = verdict[key]
        cells += ["0" if found is None else f"{found['n']:.0f}", error_cell(found)]
    return [*cells, error_cell(verdict["auroc"])]


BLOCKS: dict[str, Callable[[Path], str]] = {
    "audit": partial(audit, merged=False),
    "audit-merged": partial(audit, merged=True),
    "audit-transfer": audit_transfer,
}
