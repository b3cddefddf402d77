"""`audit.json`: the JSON document of an audit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from backdoorbench_moe.auditing.outcome import Outcome
from backdoorbench_moe.auditing.store import as_json
from backdoorbench_moe.auditing.verdict import RULE

SCHEMA_VERSION = 1
FILE = "audit.json"


def as_document(audit: Outcome) -> dict[str, Any]:
    """Return an audit as JSON values. NaN and infinity become null."""
    calibration = audit.calibration
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": "audit",
        "name": audit.name,
        "verdict": asdict(audit.verdict),
        "reasons": audit.reasons,
        "not_tested": {each.check: each.reason for each in audit.untested},
        "does_not_judge": {each.check: each.why_not for each in audit.unjudged},
        "above_but_does_not_judge": [each.check for each in audit.above_unjudged],
        "left_out": audit.left_out,
        "rule": RULE,
        "thresholds": thresholds_line(audit),
        "subject": audit.facts,
        "findings": [asdict(each) for each in audit.findings],
        "seconds": audit.seconds,
        "calibration": None
        if calibration is None
        else {
            name: value for name, value in calibration.document.items() if name not in ("checks", "groups")
        },
    }
    values: dict[str, Any] = as_json(document)
    return values


def thresholds_line(audit: Outcome) -> str:
    """State the origin of the thresholds, in one line."""
    if audit.calibration is None:
        return (
            "not calibrated; they are published or come from statistical tests, and it is not known how often clean "
            "models exceed them"
        )
    return audit.calibration.line


def above_line(document: Mapping[str, Any]) -> str:
    """List the checks that are above their thresholds but do not judge, in one line; "" without any."""
    names = document["above_but_does_not_judge"]
    found = {each["check"]: each for each in document["findings"]}
    shown = [
        f"{name} ({found[name]['score']:.2f}; threshold {found[name]['threshold']:.2f})" for name in names
    ]
    return f"Above the threshold, but not counted for the verdict: {', '.join(shown)}." if shown else ""


def by_why_not(findings: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the findings of checks that do not judge, by reason."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in findings:
        if each["why_not"]:
            found.setdefault(each["why_not"], []).append(each)
    return found


def to_text(document: Mapping[str, Any]) -> str:
    """Format the document of an audit or of a calibration as JSON."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
