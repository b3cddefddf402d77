"""An audit: the checks of a subject and the verdict."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from backdoorbench_moe.auditing.calibration import Calibration, packaged
from backdoorbench_moe.auditing.check import Check, NotTested, lacks
from backdoorbench_moe.auditing.checks import CHECKS
from backdoorbench_moe.auditing.outcome import Outcome
from backdoorbench_moe.auditing.plan import WORTH_SAYING, Plan
from backdoorbench_moe.auditing.save import save_audit
from backdoorbench_moe.auditing.store import Store, subject_digest
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.auditing.suitability import doubt_of
from backdoorbench_moe.auditing.verdict import Finding, combine, judge, not_tested
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.durations import say_time
from backdoorbench_moe.engine.device import environment
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.moe.structure import Merged
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.paths import expand


class Audit(Outcome):
    """Results of an audit, which can be saved."""

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write audit.json and report.html to a folder, which is created if it does not exist.

        Returns:
            The paths of the two files.

        Raises:
            RecordError: A file cannot be written.
        """
        return save_audit(self, expand(folder))


def run_audit(
    subject: Subject,
    *,
    name: str,
    store: Store,
    checks: Sequence[Check] = CHECKS,
    calibration: Calibration | None = None,
    calibrated: bool = True,
    budget: float | None = None,
    observer: Observer | None = None,
) -> Audit:
    """Run checks on a subject.

    A check whose result is in the store is not run again; its stored score is compared with the current thresholds.
    This also applies to checks of the package that are not chosen now but were run by an earlier call, so that an audit
    with fewer checks keeps earlier results.

    Args:
        subject: The subject, whose `keep` should be that of the store.
        name: Name of the model.
        store: Results of earlier calls.
        checks: The checks to run.
        calibration: The calibration; None for the packaged one for mixtures if the model is a mixture of merged
            experts, and for the packaged one for other models otherwise.
        calibrated: Whether to use a calibration.
        budget: Time limit in seconds. A check that would take longer than the remaining time is not run; a later call
            can run it. None for no limit.
        observer: Receives progress.

    Raises:
        RecordError: A result cannot be written.
    """
    observer = observer or Observer()
    merged = isinstance(subject.model, Merged)
    chosen = (calibration or packaged(merged=merged)) if calibrated else None
    plan = Plan(subject, store, checks, budget)
    if plan.total >= WORTH_SAYING:
        observer.on_message(f"{len(checks)} checks, about {say_time(plan.total)} on this machine")
    made = {}
    for number, check in enumerate(checks, 1):
        seconds = plan.seconds(check)
        about = f", about {say_time(seconds)}" if seconds >= WORTH_SAYING else ""
        observer.on_message(f"check {number} of {len(checks)}: {check.name} ({check.title}){about}")
        too_long = plan.too_long(check)
        made[check.name] = not_tested(check, too_long) if too_long else _find(check, subject, store, chosen)
    others = [check for check in CHECKS if check.name not in made]
    kept = {check.name: found for check in others if (found := _earlier(check, store, chosen))}
    findings = _ordered({**made, **kept})
    return Audit(
        name=name,
        verdict=combine(findings),
        findings=tuple(findings),
        calibration=chosen,
        left_out=tuple(check.name for check in others if check.name not in kept),
        facts=facts_of(subject, [*checks, *(check for check in others if check.name in kept)]),
        seconds=sum(each.seconds for each in findings),
    )


def _find(check: Check, subject: Subject, store: Store, calibration: Calibration | None) -> Finding:
    """Run a check, or load its result from the store."""
    found = store.load(check)
    if found is None:
        started = time.perf_counter()
        try:
            # A model may draw random numbers, as with the gate Sample Top-1.
            with seeded(subject.seed, "audit", check.name):
                measured = check.run(subject)
        except NotTested as reason:
            store.save_reason(check, str(reason))
            return not_tested(check, str(reason))
        found = measured, time.perf_counter() - started
        store.save(check, *found)
    return judge(check, found[0], calibration, found[1])


def _earlier(check: Check, store: Store, calibration: Calibration | None) -> Finding | None:
    """Return the finding of a check in an earlier call; None if it was not run."""
    if found := store.load(check):
        return judge(check, found[0], calibration, found[1])
    reason = store.load_reason(check)
    return None if reason is None else not_tested(check, reason)


def _ordered(findings: Mapping[str, Finding]) -> list[Finding]:
    """Sort findings, given by check: the package's checks in their order, then the others."""
    names = [check.name for check in CHECKS if check.name in findings]
    return [findings[name] for name in dict.fromkeys([*names, *findings])]


def testable(subject: Subject, checks: Sequence[Check]) -> Iterator[Check]:
    """Yield the checks whose needs the subject meets."""
    return (check for check in checks if not any(lacks(subject, need) for need in check.needs))


def cost_of(subject: Subject, checks: Sequence[Check]) -> Cost:
    """Return an upper bound of the number of images that the checks pass through the model."""
    costs = [check.cost(subject) for check in testable(subject, checks)]
    return Cost(sum(cost.trained for cost in costs), sum(cost.predicted for cost in costs))


def facts_of(subject: Subject, checks: Sequence[Check]) -> dict[str, Any]:
    """Return facts about the audited subject as JSON values."""
    given = subject.images is not None
    cost = cost_of(subject, checks)
    with seeded(subject.seed, "audit", "doubt"):
        doubt = doubt_of(subject)
    return {
        "model": type(subject.model).__name__,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "images": len(subject.split) if given else 0,
        "classes": subject.num_classes if given else None,
        "labels": subject.known_labels is not None,
        "accuracy": subject.accuracy if given else None,
        "doubt": doubt,
        "tasks": len(subject.tasks),
        "base": subject.base is not None,
        "seed": subject.seed,
        "environment": environment(subject.device, subject.precision),
        "cost": {"forward_and_backward": round(cost.trained), "forward": round(cost.predicted)},
    }


def digest_of(subject: Subject) -> str:
    """Return the digest of everything that a score depends on."""
    state = subject.model.state_dict()
    tensors = {
        # The extra state of a module may be any object.
        **{f"model/{name}": each for name, each in state.items() if isinstance(each, Tensor)},
        "images": subject.images,
        "labels": subject.known_labels,
        **{f"tasks/{n}": each for n, each in enumerate(subject.tasks)},
        **{f"base/{name}": each for name, each in (subject.base or {}).items()},
    }
    return subject_digest(
        tensors,
        model=type(subject.model).__name__,
        size=subject.given_size,
        precision=subject.precision,
        seed=subject.seed,
        classes=list(subject.classes),
        **({"task_names": list(subject.task_names)} if subject.task_names else {}),
    )
