"""`report.html` of an audit: a self-contained page, drawn from its JSON document."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from backdoorbench_moe.auditing.document import above_line, by_why_not
from backdoorbench_moe.auditing.verdict import MOST_REASONS, NOT_TESTED, SIGNS
from backdoorbench_moe.drawing import render_page

FILE = "report.html"
# Largest strength that is drawn.
LONGEST = 2.0
WIDTH = 160


def page(document: dict[str, Any]) -> str:
    """Render the page of an audit's document. Names from the document are escaped."""
    template = (files("backdoorbench_moe.auditing") / "templates" / "audit.html").read_text(encoding="utf-8")
    findings = document["findings"]
    measured = [each for each in findings if each["level"] != NOT_TESTED]
    return render_page(
        template,
        name=document["name"],
        verdict=document["verdict"],
        signs=document["verdict"]["level"] == SIGNS,
        calibrated=document["calibration"] is not None,
        doubt=document["subject"]["doubt"],
        reasons=document["reasons"],
        reasons_title=reasons_title(document),
        untested=[each for each in findings if each["level"] == NOT_TESTED],
        unjudged=by_why_not(findings),
        above=above_line(document),
        left_out=document["left_out"],
        measured=[
            {**each, "bar": bar(each["strength"]), "sign": each["level"] == SIGNS} for each in measured
        ],
        pictures=[each for each in measured if "picture" in each["details"]],
        rule=document["rule"],
        thresholds=document["thresholds"],
        facts=fact_rows(document),
        width=WIDTH,
        seconds=document["seconds"],
    )


def reasons_title(document: dict[str, Any]) -> str:
    """Return the heading of the reasons."""
    level, count = document["verdict"]["level"], len(document["reasons"])
    if level == SIGNS:
        return (
            "The strongest reason"
            if count == 1
            else f"The {'three ' if count == MOST_REASONS else ''}strongest reasons"
        )
    if count:
        return "The findings closest to a sign"
    return "No check that was run judges" if document["does_not_judge"] else "Nothing could be tested"


def bar(strength: float | None) -> float:
    """Return the length of the bar of a strength, in [0, WIDTH]. The threshold is at WIDTH / 2."""
    return round(WIDTH * min(max(strength or 0.0, 0.0), LONGEST) / LONGEST, 1)


def fact_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return facts about the audited subject, as pairs of a label and a text."""
    facts = document["subject"]
    accuracy = facts["accuracy"]
    rows = [
        ("model", f"{facts['model']}, {facts['parameters']:,} parameters"),
        ("images", f"{facts['images']:,}" if facts["images"] else "none"),
        ("classes", str(facts["classes"] or "not known")),
        ("labels", "given" if facts["labels"] else "none; predicted classes are used instead"),
        ("accuracy on the images", "not known" if accuracy is None else f"{accuracy:.1f}%"),
        ("tasks", str(facts["tasks"] or "none")),
        ("base", "given" if facts["base"] else "none"),
        ("images passed forward and backward", f"at most {facts['cost']['forward_and_backward']:,}"),
        ("images passed forward", f"at most {facts['cost']['forward']:,}"),
        ("seed", str(facts["seed"])),
        ("device", f"{facts['environment']['device']}, {facts['environment']['precision']}"),
        ("version", facts["environment"]["packages"]["backdoorbench-moe"]),
    ]
    return rows
