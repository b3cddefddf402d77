"""What an audit found, without the ways to make and to save it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backdoorbench_moe.auditing.calibration import Calibration
from backdoorbench_moe.auditing.verdict import DOES_NOT_JUDGE, NOT_TESTED, Finding, Verdict, strongest


@dataclass(frozen=True)
class Outcome:
    """What an audit found.

    Attributes:
        name: Name of the model.
        verdict: The verdict; `verdict.level` is "signs of a backdoor", "no sign found" or "not tested".
        findings: What each check found, in the order in which they ran; those of earlier calls included.
        calibration: The calibrated thresholds; None if there are none.
        left_out: Names of the checks that were not chosen, neither now nor in an earlier call.
        facts: What was audited: model, number of images, accuracy on them, and so on.
        seconds: How long the checks took, those of an earlier call included.
    """

    name: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    calibration: Calibration | None
    left_out: tuple[str, ...]
    facts: dict[str, Any]
    seconds: float

    @property
    def reasons(self) -> list[str]:
        """The three strongest reasons for the verdict, in plain words."""
        return [each.reason for each in strongest(self.findings)]

    @property
    def untested(self) -> list[Finding]:
        """The checks that could not be made, with the reasons."""
        return [each for each in self.findings if each.level == NOT_TESTED]

    @property
    def unjudged(self) -> list[Finding]:
        """The checks that were measured but do not judge, with the reasons in `why_not`."""
        return [each for each in self.findings if each.level == DOES_NOT_JUDGE]

    @property
    def above_unjudged(self) -> list[Finding]:
        """The checks that do not judge, and whose scores are above their thresholds all the same."""
        return [each for each in self.unjudged if (each.strength or 0.0) > 1]
