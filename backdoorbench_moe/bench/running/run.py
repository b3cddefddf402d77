"""Execution of the missing runs of a suite: they are checked first and then passed to an engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backdoorbench_moe.bench.running.engines import Engine
from backdoorbench_moe.bench.running.estimate import kinds, measure_speed, seconds_left
from backdoorbench_moe.bench.running.plan import Planned, read_plan
from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.bench.suites.paper import load_paper
from backdoorbench_moe.bench.suites.suite import Suite, order
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.plots import build_panels
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.build import build_model
from backdoorbench_moe.engine.graph import reference
from backdoorbench_moe.engine.run import Run, check_options, check_plugins, load_run
from backdoorbench_moe.engine.runner import Runner
from backdoorbench_moe.engine.twin import link_twin
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeError, RecordError
from backdoorbench_moe.paths import expand
from backdoorbench_moe.plugins import describe_error, raised_in
from backdoorbench_moe.records import RunFolder
from backdoorbench_moe.wording.counting import count


@dataclass
class Report:
    """Result of one call of `run_suite`.

    Attributes:
        total: Number of runs of the suite.
        found: Number of runs that were finished before the call.
        outcomes: Outcomes of the other runs.
    """

    total: int
    found: int
    outcomes: list[Outcome] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Count the outcomes with a status; "finished" counts the runs that this call executed itself."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failed(self) -> list[Outcome]:
        """The runs that failed, with their errors."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @property
    def is_complete(self) -> bool:
        """Whether every run of the suite is finished."""
        return self.found + self.count("found") + self.count("finished") == self.total


def run_suite(
    suite: Suite,
    engine: Engine,
    *,
    output: Path | str = "runs",
    budget: float | None = None,
    known: Collection[str] = (),
    on_outcome: Callable[[Outcome], object] = lambda outcome: None,
    on_check: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Execute the runs of a suite that are not finished in `output`.

    Clean twins come first, and all runs of one seed before those of the next. Runs that failed before are retried.

    Args:
        suite: The suite.
        engine: Executes the runs.
        output: Folder of run folders.
        budget: Seconds after which to stop, even during a run, which the next call continues; None for no limit.
        known: Digests of runs that are finished elsewhere and are skipped.
        on_outcome: Called with each outcome.
        on_check: Called with the number of cells checked so far, and the number of all cells.

    Raises:
        BbmoeError: The suite or an option is invalid; raised before anything is trained.
        RecordError: A finished run was made with other code of a plug-in or with other defaults, so that a table would
            mix its results with those of the code that is installed now.
    """
    deadline = None if budget is None else time.time() + budget
    output, specs = expand(output), list(order(suite))
    planned = read_plan(specs, output, known)
    todo = [run.spec for run in planned if run.status != "finished"]
    report = Report(total=len(specs), found=len(specs) - len(todo))
    check_found([run.spec for run in planned if run.status == "finished"], output, known)
    check(suite, todo, output, on_check)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"--output {output}: {error.strerror}") from error
    links = Links(specs, output)
    links.make()
    jobs = [Job(spec.to_dict(), str(output), deadline) for spec in todo]
    for outcome in engine.run(jobs) if jobs else ():
        report.outcomes.append(outcome)
        if outcome.status in ("finished", "found"):
            links.make(outcome.name)
        on_outcome(outcome)
    return report


def check_found(specs: Sequence[RunSpec], output: Path, known: Collection[str] = ()) -> None:
    """Check that finished runs would be made with the same code of plug-ins and the same defaults now.

    Args:
        specs: The finished runs.
        output: Folder of run folders.
        known: Digests of runs whose records are elsewhere; they are not checked.

    Raises:
        RecordError: Some would not; the message is that of the first one, with their number.
    """
    runs = [load_run(output / spec.name) for spec in specs if spec.digest not in known]
    found = {run.folder.path: error for run in runs if (error := _changed(run)) is not None}
    if found:
        first, *_ = found.values()
        raise RecordError(f"{first} ({len(found)} of {count(len(runs), 'finished run')} changed)") from first


def _changed(run: Run) -> RecordError | None:
    """Return the error that tells in what a run differs from one that would be made now; None if in nothing."""
    try:
        check_plugins(run.folder, run.record)
        check_options(run)
    except RecordError as error:
        return error
    return None


def check(
    suite: Suite,
    specs: Sequence[RunSpec],
    output: Path,
    on_check: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Check a suite without training anything.

    Tables and plots are laid out without values. For every cell, the parts of one run are built and checked against the
    data.

    Raises:
        BbmoeError: The first error found; it names the table or the run.
    """
    empty = ResultSet(suite, {}, load_paper(suite))
    build_sheet(empty)
    for plot in suite.plots:
        build_panels(empty, plot)
    one_each = {_without_seed(spec): spec for spec in reversed(specs)}
    runner: tuple[str, Runner] | None = None
    for done, spec in enumerate(reversed(one_each.values()), 1):
        key = _workplace_key(spec)
        try:
            if runner is None or runner[0] != key:
                runner = key, Runner(spec, output)
            runner[1].check(spec)
        except Exception as error:
            if not isinstance(error, BbmoeError) and raised_in(error) is None:
                raise  # A fault of this package, whose traceback is needed.
            raise BbmoeError(f"suite {suite.label}: {spec.name}: {describe_error(error)}") from error
        on_check(done, len(one_each))


def estimate(
    runs: Sequence[Planned], on_time: Callable[[int, int], object] = lambda done, total: None
) -> Iterator[tuple[Planned, float | None]]:
    """Yield every run with its remaining seconds, estimated from a short measurement of each kind of run.

    The seconds are None if unknown; see `seconds_left`.

    Args:
        runs: The runs.
        on_time: Called with the number of kinds measured so far, from 0, and the number of all kinds.
    """
    seconds: dict[str, float | None] = {}
    groups = list(kinds([run for run in runs if run.status != "finished"]))
    on_time(0, len(groups))
    for done, (_, group) in enumerate(groups, 1):
        images = Workplace(group[0].spec).data
        speed = measure_speed(group[0].spec, images)
        model = build_model(group[0].spec, images.model_options)
        seconds |= {run.spec.digest: seconds_left(run, speed, images, model) for run in group}
        on_time(done, len(groups))
    return ((run, seconds.get(run.spec.digest, 0.0)) for run in runs)


class Links:
    """The runs of a suite and the clean twins with which they are compared.

    Args:
        specs: The runs.
        output: Folder of run folders.
    """

    def __init__(self, specs: Sequence[RunSpec], output: Path) -> None:
        self.output = output
        self.pairs = [(spec, twin) for spec in specs if (twin := reference(spec)) is not None]
        self._workplaces: dict[str, Workplace] = {}

    def make(self, name: str | None = None) -> None:
        """Compare finished runs with their finished twins; if a name is given, only pairs that include this run."""
        for spec, twin in self.pairs:
            if name is not None and name not in (spec.name, twin.name):
                continue
            folders = [RunFolder(self.output / each.name) for each in (spec, twin)]
            if all(folder.exists for folder in folders):
                run, clean = (load_run(folder.path) for folder in folders)
                if run.record.status == clean.record.status == "finished":
                    link_twin(run, clean, self._workplace(spec))

    def _workplace(self, spec: RunSpec) -> Workplace:
        """Return the workplace of a run; runs on the same data share it."""
        key = _workplace_key(spec)
        self._workplaces[key] = self._workplaces.get(key) or Workplace(spec)
        return self._workplaces[key]


def _workplace_key(spec: RunSpec) -> str:
    """Return a key that is equal for runs that can use the same workplace."""
    return json.dumps([spec.dataset.to_dict(), spec.device, spec.precision], sort_keys=True)


def _without_seed(spec: RunSpec) -> str:
    return json.dumps({**spec.to_dict(), "seed": 0}, sort_keys=True)
