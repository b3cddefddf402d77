"""A queue of suites, run in order, and saved in results folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from backdoorbench_moe import data
from backdoorbench_moe.bench.running.engines import Engine
from backdoorbench_moe.bench.running.plan import read_plan, with_place
from backdoorbench_moe.bench.running.run import Report, run_suite
from backdoorbench_moe.bench.running.worker import Outcome
from backdoorbench_moe.bench.save import save_results
from backdoorbench_moe.bench.suites.reading import load_suite
from backdoorbench_moe.bench.suites.suite import Suite, order
from backdoorbench_moe.bench.tables.results import MANIFEST, ResultSet, check_manifest, read_known, with_seeds
from backdoorbench_moe.config import load_yaml
from backdoorbench_moe.errors import ConfigError, RecordError, UnknownNameError
from backdoorbench_moe.options import convert
from backdoorbench_moe.records import Record

# The only key of a queue file.
ENTRIES = "queue"


@dataclass(frozen=True)
class Entry:
    """A suite in a queue, or a part of a suite.

    Args:
        suite: Name of the suite, or path of its file.
        scale: One of the suite's scales; the first by default.
        repeats: Number of seeds per cell; all of the suite's by default.
        only: Filters of cells; see `Suite.only`.
    """

    suite: str
    scale: str | None = None
    repeats: int | None = None
    only: tuple[str, ...] = ()

    @cached_property
    def whole(self) -> Suite:
        """The suite at its scale with all cells and its own number of seeds."""
        return load_suite(self.suite, self.scale)

    @cached_property
    def part(self) -> Suite:
        """The suite with the cells and seeds of the entry."""
        suite = self.whole.only(self.only)
        return suite if self.repeats is None else suite.with_repeats(self.repeats)

    @property
    def label(self) -> str:
        """The entry in one line, such as "standard-attacks:small, 1 seed, model=pmoe"."""
        scale = "" if self.whole.scale is None else f":{self.whole.scale}"
        seeds = self.part.repeats
        return ", ".join([f"{self.whole.name}{scale}", f"{seeds} seed{'s' if seeds > 1 else ''}", *self.only])

    def folder(self, results: Path) -> Path:
        """Return the results folder of the suite in the folder of results folders."""
        return results / self.whole.name / (self.whole.scale or "")

    def placed(self, root: str | None, device: str | None) -> Suite:
        """Return the entry's part on a device, with the data sets that need a folder read from `root`."""

        def has_root(spec: Any) -> bool:
            return root is not None and "root" in data.registry.options(spec.dataset.name)

        suite = with_place(self.part, {}, device)
        cells = (
            replace(cell, spec=cell.spec.with_data(root=root)) if has_root(cell.spec) else cell
            for cell in suite.cells
        )
        return replace(suite, cells=tuple(cells))


def read_queue(file: Path) -> list[Entry]:
    """Read a queue: a YAML file with a list under the key `queue`, each entry a mapping with the keys of `Entry`.

    All suites are read, so that mistakes are found before anything is run.

    Raises:
        ConfigError: The file has the wrong format, or an entry does not match its suite.
    """
    values = load_yaml(file, "queue file")
    for key in values:
        if key != ENTRIES:
            raise UnknownNameError(f"queue {file}: key", str(key), [ENTRIES])
    items = values.get(ENTRIES)
    if not isinstance(items, list) or not items:
        raise ConfigError.expected(f"queue {file}: {ENTRIES}", "a list of at least one entry", items)
    return [_read_entry(item, f"queue {file}: entry {number}") for number, item in enumerate(items, 1)]


def _read_entry(item: object, where: str) -> Entry:
    kinds = {"suite": str, "scale": str | None, "repeats": int | None, "only": tuple[str, ...]}
    if not isinstance(item, dict):
        raise ConfigError.expected(where, "a mapping", item)
    for key in item:
        if key not in kinds:
            raise UnknownNameError(f"{where}: key", str(key), [each.name for each in fields(Entry)])
    if "suite" not in item:
        raise ConfigError.expected(f"{where}: suite", "the name of a suite", None)
    entry = Entry(**{key: convert(value, kinds[key], f"{where}: {key}") for key, value in item.items()})
    try:
        entry.part  # noqa: B018 - lays out the suite, which checks it
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return entry


@dataclass(frozen=True)
class Progress:
    """Result of one call for an entry.

    Attributes:
        entry: The entry.
        report: The outcomes of its runs.
        saved: The results folder that was written; None if it already had all these records.
    """

    entry: Entry
    report: Report
    saved: Path | None


class Watcher(Protocol):
    """Receives the progress of the runs of an entry."""

    def on_check(self, done: int, total: int) -> None:
        """Called with the number of cells checked so far, and the number of all cells."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Called when a run has ended."""

    def conclude(self, report: Report) -> None:
        """Called when the entry is done, or the budget is used up."""


def work_off(
    entries: Sequence[Entry],
    engine: Engine,
    *,
    output: Path,
    results: Path,
    watch: Callable[[Suite, Mapping[str, Record]], AbstractContextManager[Watcher]],
    budget: float | None = None,
    root: str | None = None,
    device: str | None = None,
) -> Iterator[Progress]:
    """Execute the missing runs of each entry in turn, and save the suite's results folder after each entry.

    Runs whose records are in a results folder in `results` are skipped. When the budget is used up, the remaining
    entries are not started, but results of other calls for them are saved.

    Args:
        entries: The queue.
        engine: Executes the runs.
        output: Folder of run folders.
        results: Folder of results folders; that of a suite is `results/SUITE/SCALE`.
        watch: Creates the watcher of an entry from its suite and the known records.
        budget: Seconds after which to stop, even during a run, which the next call continues.
        root: Folder for data sets that need one.
        device: The device to compute on.

    Yields:
        The result for each entry, in order.

    Raises:
        BbmoeError: A suite or a results folder is invalid, or the folder of a suite is of another version. Nothing is
            run in the second case.
    """
    end = None if budget is None else time.monotonic() + budget
    known = read_results(results)
    check_folders(entries, results)
    for entry in entries:
        left = None if end is None else end - time.monotonic()
        suite = entry.placed(root, device)
        if left is not None and left <= 0:
            planned = read_plan(list(order(suite)), output, known)
            report = Report(len(planned), sum(run.status == "finished" for run in planned))
        else:
            with watch(suite, known) as watcher:
                report = run_suite(
                    suite,
                    engine,
                    output=output,
                    budget=left,
                    known=known,
                    on_outcome=watcher.on_outcome,
                    on_check=watcher.on_check,
                )
            watcher.conclude(report)
        yield Progress(entry, report, save_new(entry, output, results, known))


def check_folders(entries: Sequence[Entry], results: Path) -> None:
    """Check that the results of each entry can be saved, before hours are spent on them.

    Raises:
        RecordError: The results folder of a suite is of another suite, scale or version.
    """
    for entry in entries:
        folder = entry.folder(results)
        if (folder / MANIFEST).exists():
            check_manifest(entry.whole, folder)


def save_new(entry: Entry, output: Path, results: Path, known: Mapping[str, Record]) -> Path | None:
    """Write the results folder of an entry's suite if it lacks a finished run, and return it; otherwise return None."""
    folder = entry.folder(results)
    there = read_known([folder]) if (folder / MANIFEST).exists() else {}
    # The entry, or the folder, may have more seeds than the suite.
    several = (entry.whole, entry.part, with_seeds(entry.whole, None, folder))
    suite = entry.whole.with_repeats(max(each.repeats for each in several))
    found = ResultSet.from_runs(suite, output, {**known, **there})
    if all(record.digest in there for record in found.finished()):
        return None
    save_results(found, folder)
    return folder


def read_results(results: Path) -> dict[str, Record]:
    """Read the finished records of all results folders in a folder, by digest; empty if it does not exist.

    Raises:
        RecordError: A results folder is damaged, or the folder is a file.
    """
    if results.exists() and not results.is_dir():
        raise RecordError(f"--results {results}: expected a folder, found a file")
    return read_known(sorted(file.parent for file in results.rglob(MANIFEST)))
