"""Estimates the duration of the checks of an audit from a short measurement, and selects those a budget allows."""

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

# Number of images of the measurement.
IMAGES = 100
# Smallest duration, in seconds, that is reported in advance.
WORTH_SAYING = 10.0


class Plan:
    """The remaining checks of an audit and their duration on this machine.

    Args:
        subject: The subject.
        store: Results of earlier calls.
        checks: The checks of the audit.
        budget: Time limit in seconds, starting now; None for no limit.
    """

    def __init__(self, subject: Subject, store: Store, checks: Sequence[Check], budget: float | None) -> None:
        self._subject, self._store, self._checks, self._budget = subject, store, checks, budget
        self._started = time.monotonic()
        # Checks that were skipped, so that checks that use their arrays have to compute these.
        self._skipped: set[str] = set()

    @cached_property
    def total(self) -> float:
        """Upper bound of the duration of all checks, in seconds."""
        return sum(self._own_seconds(check) for check in self._checks)

    def seconds(self, check: Check) -> float:
        """Estimate an upper bound of the duration of a check, in seconds.

        It includes checks that the check uses and that this audit does not run, since it has to compute their arrays.
        """
        chosen = {each.name for each in self._checks} - self._skipped
        used = [each for each in CHECKS if each.name in check.uses and each.name not in chosen]
        return sum(map(self._own_seconds, (check, *used))) if self._is_to_be_made(check) else 0.0

    def too_long(self, check: Check) -> str:
        """Return why the budget does not allow a check, which then counts as skipped; "" if it does."""
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
        """Estimate the duration of a check without the checks that it uses, in seconds; 0 if it will not run."""
        if not self._is_to_be_made(check):
            return 0.0
        images = check.cost(self._subject).forward(0)
        return images / self._images_per_second if images else 0.0

    def _is_to_be_made(self, check: Check) -> bool:
        """Return whether a check has no result yet and the subject meets its needs."""
        lacking = any(lacks(self._subject, need) for need in check.needs)
        return not lacking and self._store.load(check) is None

    @cached_property
    def _images_per_second(self) -> float:
        """Images per second in a forward pass, measured after a warm-up pass; infinite if the model fails."""
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
        except Exception:  # A model of unknown origin may raise any error; the checks report it.
            return float("inf")
        return len(some) / max(time.perf_counter() - started, 1e-9)
