"""Results of an audit, without the functions that compute and save them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backdoorbench_moe.auditing.calibration import Calibration
from backdoorbench_moe.auditing.verdict import DOES_NOT_JUDGE, NOT_TESTED, Finding, Verdict, strongest


@dataclass(frozen=True)
class Outcome:
    """Results of an audit.

    Attributes:
        name: Name of the model.
        verdict: The verdict; `verdict.level` is "signs of a backdoor", "no sign found" or "not tested".
        findings: The finding of each check, in the order of the checks, including those of earlier calls.
        calibration: The calibrated thresholds; None without a calibration.
        left_out: Names of the checks that were chosen neither now nor in an earlier call.
        facts: Facts about the subject, such as the model, the number of images and the accuracy on them.
        seconds: Duration of the checks in seconds, including those of earlier calls.
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
        """The strongest reasons for the verdict, at most three, in plain words."""
        return [each.reason for each in strongest(self.findings)]

    @property
    def doubt(self) -> str:
        """Why the given images may not suit the model, in one sentence; "" if nothing indicates it."""
        return str(self.facts["doubt"])

    @property
    def untested(self) -> list[Finding]:
        """The checks that could not be run, with the reasons."""
        return [each for each in self.findings if each.level == NOT_TESTED]

    @property
    def unjudged(self) -> list[Finding]:
        """The checks that were measured but do not judge, with the reasons in `why_not`."""
        return [each for each in self.findings if each.level == DOES_NOT_JUDGE]

    @property
    def above_unjudged(self) -> list[Finding]:
        """The checks that do not judge although their scores are above their thresholds."""
        return [each for each in self.unjudged if (each.strength or 0.0) > 1]
