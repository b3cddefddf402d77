"""How long the checks of an audit will take, from a short measurement, and which of them a budget allows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import torch

from backdoorbench_moe.auditing.check import Check, lacks
from backdoorbench_moe.auditing.checks import CHECKS
from backdoorbench_moe.auditing.store import Store
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.durations import say_time
from backdoorbench_moe.engine.inference import logits

# Images of the measurement.
IMAGES = 100
# Seconds from which a user is told how long something will take.
WORTH_SAYING = 10.0


class Plan:
    """The checks of an audit that are still to be made, and their time on this machine.

    Args:
        subject: The subject.
        store: What earlier calls found.
        checks: The checks of the audit.
        budget: Seconds from now on; None for no limit.
    """

    def __init__(self, subject: Subject, store: Store, checks: Sequence[Check], budget: float | None) -> None:
        self._subject, self._store, self._checks, self._budget = subject, store, checks, budget
        self._started = time.monotonic()
        # A check that makes what another one would have kept comes after it, or that one is too dear.
        self._skipped: set[str] = set()

    @cached_property
    def total(self) -> float:
        """Seconds of all checks: an upper bound."""
        return sum(self._own_seconds(check) for check in self._checks)

    def seconds(self, check: Check) -> float:
        """Estimate the seconds of a check: an upper bound.

        They include the checks that it uses and that this audit did not make, as it has to make them itself.
        """
        chosen = {each.name for each in self._checks} - self._skipped
        used = [each for each in CHECKS if each.name in check.uses and each.name not in chosen]
        return sum(map(self._own_seconds, (check, *used))) if self._is_to_be_made(check) else 0.0

    def too_long(self, check: Check) -> str:
        """Return why the budget does not allow a check, which is then taken as left out; "" if it does."""
        seconds = self.seconds(check)
        left = float("inf") if self._budget is None else self._budget - (time.monotonic() - self._started)
        if not seconds or seconds <= left:
            return ""
        self._skipped.add(check.name)
        assert self._budget is not None
        return (
            f"it would take about {say_time(seconds)}, and {say_time(max(0.0, left))} are left of the budget "
            f"of {say_time(self._budget)}"
        )

    def _own_seconds(self, check: Check) -> float:
        """Seconds of a check alone; 0 if it is not to be made."""
        if not self._is_to_be_made(check):
            return 0.0
        images = check.cost(self._subject).forward(0)
        return images / self._images_per_second if images else 0.0

    def _is_to_be_made(self, check: Check) -> bool:
        """Whether it is not made yet, and the subject has what it needs."""
        lacking = any(lacks(self._subject, need) for need in check.needs)
        return not lacking and self._store.load(check) is None

    @cached_property
    def _images_per_second(self) -> float:
        """Images that pass forward in a second, measured after they have passed once; infinite if they cannot."""
        subject = self._subject
        if subject.images is not None:
            some = subject.images[:IMAGES]
        elif (side := subject.image_size) is not None:
            some = torch.zeros(IMAGES, 3, side, side, dtype=torch.uint8, device=subject.device)
        else:
            return float("inf")
        try:
            for _ in range(2):
                started = time.perf_counter()
                logits(subject.model, some, precision=subject.precision).sum().item()
        except Exception:  # A model of unknown origin may raise anything; the checks say so.
            return float("inf")
        return len(some) / max(time.perf_counter() - started, 1e-9)
