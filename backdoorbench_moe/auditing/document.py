"""`audit.json`: an audit as JSON values."""

from __future__ import annotations

import json
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
        "does_not_judge": {each.check: each.reason for each in audit.unjudged},
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
    """Say where the thresholds come from, in one line."""
    if audit.calibration is None:
        return (
            "not calibrated: thresholds are published ones or those of statistical tests, and how often clean models "
            "exceed them is not known"
        )
    return audit.calibration.line


def to_text(document: dict[str, Any]) -> str:
    """Format a document as JSON."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
