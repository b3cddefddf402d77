"""Progress of a suite: finished, running and failed runs, images per second, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from backdoorbench_moe.bench.running.plan import Planned, read_plan
from backdoorbench_moe.bench.suites.suite import order
from backdoorbench_moe.durations import say_time
from backdoorbench_moe.wording.counting import count

if TYPE_CHECKING:
    from backdoorbench_moe.bench.running.run import Report
    from backdoorbench_moe.bench.running.worker import Outcome
    from backdoorbench_moe.bench.suites.suite import Suite

REFRESH_PER_SECOND = 1


def make_display(suite: Suite, output: Path, known: Collection[str] = (), *, quiet: bool) -> Display:
    """Create the display on standard error: live on a terminal, otherwise one line per run.

    Args:
        suite: The suite.
        output: Folder of run folders.
        known: Digests of runs that are finished elsewhere.
        quiet: Whether to show only the summary and failed runs.
    """
    if quiet:
        return Display(suite)
    return LiveDisplay(suite, output, known) if sys.stderr.isatty() else LineDisplay(suite, output, known)


class Display(AbstractContextManager["Display"]):
    """Shows only the summary at the end, with the errors of failed runs."""

    def __init__(self, suite: Suite) -> None:
        self.suite, self.console = suite, Console(stderr=True, highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""

    def on_check(self, done: int, total: int) -> None:
        """Called when the first run of the next cell has been checked."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Called when a run has ended."""

    def conclude(self, report: Report) -> None:
        """Print how many runs finished, failed or are left, and the error of each failed run."""
        made, others = report.count("finished"), report.count("found")
        left = report.total - report.found - made - others - len(report.failed)
        elsewhere = f"{others} finished by another process, " if others else ""
        self.console.print(
            f"{self.suite.label}: {count(report.total, 'run')}, {report.found} already finished, {made} finished now, "
            f"{elsewhere}{len(report.failed)} failed, {left} left"
        )
        for outcome in report.failed:
            self.console.print(
                f"failed: {outcome.name}: {outcome.error}", style="red", markup=False, soft_wrap=True
            )


class LineDisplay(Display):
    """Prints a line for every run that has ended."""

    def __init__(self, suite: Suite, output: Path, known: Collection[str] = ()) -> None:
        super().__init__(suite)
        self._started = time.perf_counter()
        runs = read_plan(list(order(suite)), output, known)
        self._total = len(runs)
        # Runs that were finished before count as well, so that the numbers end at the total.
        self._ended = sum(run.status == "finished" for run in runs)

    def on_outcome(self, outcome: Outcome) -> None:
        """Print status, name and time of the run."""
        self._ended += 1
        passed = say_time(time.perf_counter() - self._started)
        text = f"{outcome.status}: {outcome.name} ({self._ended} of {self._total}, after {passed})"
        self.console.print(text, markup=False, soft_wrap=True)


class LiveDisplay(Display):
    """Draws a bar for every running run, of this and other processes, from the life signs in the run folders."""

    def __init__(self, suite: Suite, output: Path, known: Collection[str] = ()) -> None:
        super().__init__(suite)
        self.output, self._known, self._checked = output, known, ""
        self._specs = list(order(suite))
        self._live = Live(
            console=self.console,
            refresh_per_second=REFRESH_PER_SECOND,
            get_renderable=self._draw,
            transient=True,
        )

    def __enter__(self) -> LiveDisplay:
        """Start drawing."""
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._live.stop()

    def on_check(self, done: int, total: int) -> None:
        """Show how many cells have been checked."""
        self._checked = f"checking {done}/{total}" if done < total else ""

    def _draw(self) -> RenderableType:
        runs = read_plan(self._specs, self.output, self._known)
        return Group(self._summary(runs), *map(_bar, [run for run in runs if run.status == "running"]))

    def _summary(self, runs: list[Planned]) -> Text:
        counts = {name: sum(run.status == name for run in runs) for name in ("finished", "running", "failed")}
        rate = sum(run.images_per_second for run in runs)
        text = Text(f"{self.suite.label}  {counts['finished']}/{len(runs)} done, {counts['running']} running")
        if counts["failed"]:
            text.append(f", {counts['failed']} failed", style="red")
        if rate:
            # Estimated from epochs, as most runs of a suite have the same number of images per epoch.
            waiting = [run for run in runs if run.status not in ("finished", "failed")]
            left = sum((run.total_epochs - run.epochs) * run.share for run in waiting)
            images = next(run.images for run in runs if run.images)
            text.append(f"  {rate:.0f} images/s  about {say_time(left * images / rate)} left")
        return text.append(f"  {self._checked}") if self._checked else text


def _bar(run: Planned) -> Table:
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=run.total_epochs, completed=run.epochs, width=20)
    shown = f"epoch {run.epochs:.1f}/{run.total_epochs}  {run.images_per_second:.0f} images/s"
    grid.add_row(bar, shown, Text(run.spec.name, overflow="ellipsis", no_wrap=True))
    return grid
