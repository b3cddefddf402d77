"""Base class of the analyses of runs on images and on texts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.analysis import comparison, gate_shares, latents
from backdoorbench_moe.analysis.facts import run_facts
from backdoorbench_moe.analysis.results import Analysis, AnalysisOptions, ImageCounts, MissingPart
from backdoorbench_moe.engine.measuring.mixtures import MixturePass
from backdoorbench_moe.engine.measuring.texts import TextPass
from backdoorbench_moe.engine.opening.opened_run import OpenedRun, open_beside
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.errors import BbmoeError


class Analyzer:
    """Base class of a computation of one analysis.

    Args:
        opened: The run to analyze.
        against: The run to compare with; None for the clean twin.
        options: Options that change the results.
        observer: Receives progress.
    """

    def __init__(
        self, opened: OpenedRun, against: Run | None, options: AnalysisOptions, observer: Observer
    ) -> None:
        self.started = time.perf_counter()
        self.opened, self.options, self.observer = opened, options, observer
        self.absent: list[MissingPart] = []
        self.seconds: dict[str, float] = {}
        self.other = self._open_other(against)

    def _new(self, images: ImageCounts) -> Analysis:
        """Return an analysis without any part."""
        return Analysis(
            run=run_facts(self.opened.run),
            against=None if self.other is None else run_facts(self.other.run),
            options=self.options,
            images=images,
            absent=(),
            seconds={},
        )

    def _finished(self, found: Analysis) -> Analysis:
        """Return an analysis with its missing parts and its computing times."""
        total = time.perf_counter() - self.started
        return replace(found, absent=tuple(self.absent), seconds=self.seconds | {"total": total})

    def _miss(self, part: str, reason: str) -> None:
        self.absent.append(MissingPart(part, reason))

    def _latents(
        self, find: Callable[[int], latents.ExpertLatents]
    ) -> tuple[latents.ExpertLatents, ...] | None:
        """Return the latents of each poisoned expert; None without one, or if a run that it depends on is missing.

        Args:
            find: Computes the latents of the expert with a given number.
        """
        spec = self.opened.run.spec
        if spec.mixture is None or not spec.attacked:
            return None
        task = spec.mixture.task
        experts = spec.mixture.poisoned_experts if task is None else (task,)
        try:
            with self._timed("latents"):
                return tuple(find(expert) for expert in experts)
        except BbmoeError as error:
            self._miss("latents", without_folder(error, self.opened.run.folder.path.parent))
            return None

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.observer.on_message(f"analyzing {self.opened.name}: {name}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _open_other(self, against: Run | None) -> OpenedRun | None:
        """Open the run to compare with: the given one or, if it can be used, the clean twin."""
        if against is not None:
            other = open_beside(against, self.opened)
            comparison.check_comparable(self.opened, other)
            return other
        if (folder := twin_folder(self.opened.run)) is None:
            self._miss("against", "no other run was named, and there is no clean twin")
            return None
        try:
            other = open_beside(load_run(folder), self.opened)
            comparison.check_comparable(self.opened, other)
        except BbmoeError as error:
            reason = without_folder(error, folder.parent)
            self._miss("against", f"the clean twin cannot be used: {reason}")
            return None
        return other

    def _experts(
        self, found: MixturePass | TextPass, against: MixturePass | TextPass | None
    ) -> gate_shares.ExpertFindings:
        """Return the gate shares of a mixture and of the mixture that it is compared with."""
        opened = self.opened
        assert opened.tasks is not None and opened.run.spec.mixture is not None
        return gate_shares.ExpertFindings(
            tasks=tuple(opened.tasks.names),
            poisoned=opened.run.spec.mixture.poisoned_experts,
            shares=gate_shares.model_shares(found),
            shares_against=None if against is None else gate_shares.model_shares(against),
        )


def without_folder(error: BbmoeError, folder: Path) -> str:
    """Return the text of an error without the parent folder of the runs, since reports are shared with others."""
    return str(error).replace(f"{folder}{os.sep}", "")


def twin_folder(run: Run) -> Path | None:
    """Return the folder of a run's clean twin; None if the run has no twin or the folder does not exist."""
    name = run.record.clean_twin
    if not name or Path(name).name != name:
        return None
    folder = run.folder.path.parent / name
    return folder if folder.is_dir() else None
