"""A queue of suites: what is to be run next, in which order, and where the records go."""

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
from backdoorbench_moe.bench.tables.results import MANIFEST, ResultSet, read_known
from backdoorbench_moe.config import load_yaml
from backdoorbench_moe.errors import ConfigError, RecordError, UnknownNameError
from backdoorbench_moe.options import convert
from backdoorbench_moe.records import Record

# The only key of a queue's file.
ENTRIES = "queue"


@dataclass(frozen=True)
class Entry:
    """A suite in a queue, or a part of it.

    Args:
        suite: Name of the suite, or path of its file.
        scale: One of the suite's scales, the first by default.
        repeats: Only so many seeds of each cell; all of the suite by default.
        only: Only the cells that match these filters; see `Suite.only`.
    """

    suite: str
    scale: str | None = None
    repeats: int | None = None
    only: tuple[str, ...] = ()

    @cached_property
    def whole(self) -> Suite:
        """The suite at its scale, all cells and seeds of it, as its results folder holds it."""
        return load_suite(self.suite, self.scale)

    @cached_property
    def part(self) -> Suite:
        """The cells and seeds that the entry asks for."""
        suite = self.whole.only(self.only)
        return suite if self.repeats is None else suite.with_repeats(self.repeats)

    @property
    def label(self) -> str:
        """The entry in one line, such as "standard-attacks:small, 1 seed, model=pmoe"."""
        scale = "" if self.whole.scale is None else f":{self.whole.scale}"
        seeds = self.part.repeats
        return ", ".join([f"{self.whole.name}{scale}", f"{seeds} seed{'s' if seeds > 1 else ''}", *self.only])

    def folder(self, results: Path) -> Path:
        """The results folder of the suite below the folder of all results."""
        return results / self.whole.name / (self.whole.scale or "")

    def placed(self, root: str | None, device: str | None) -> Suite:
        """The entry's part on a device, with the data sets that lie in a folder taken from `root`."""

        def has_root(spec: Any) -> bool:
            return root is not None and "root" in data.registry.options(spec.dataset.name)

        suite = with_place(self.part, {}, device)
        cells = (
            replace(cell, spec=cell.spec.with_data(root=root)) if has_root(cell.spec) else cell
            for cell in suite.cells
        )
        return replace(suite, cells=tuple(cells))


def read_queue(file: Path) -> list[Entry]:
    """Read a queue: a YAML file whose key `queue` has a list of entries, each a mapping with the keys of `Entry`.

    Every suite is laid out, so that a mistake is found before anything is run.

    Raises:
        ConfigError: The file is not of this form, or an entry asks for something that its suite does not have.
    """
    values = load_yaml(file)
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
    """What one call did for an entry.

    Attributes:
        entry: The entry.
        report: How its runs ended.
        saved: The results folder that was written; None if it had all these records before.
    """

    entry: Entry
    report: Report
    saved: Path | None


class Watcher(Protocol):
    """Is told how the runs of an entry go on."""

    def on_check(self, done: int, total: int) -> None:
        """Called with the number of cells that are checked so far, and with the number of all cells."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Called when a run ended."""

    def conclude(self, report: Report) -> None:
        """Called when the entry ended, or the budget."""


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
    """Make the missing runs of each entry in turn, and save the suite's results folder after it.

    A run whose record is in any results folder below `results` is not made again. When the budget has ended, the
    entries that are left are not begun, but what other calls made for them is saved.

    Args:
        entries: The queue.
        engine: Makes the runs.
        output: Folder of run folders.
        results: Folder of results folders; that of a suite is `results/SUITE/SCALE`.
        watch: Makes the watcher of an entry from its suite and the records that are known.
        budget: Seconds after which to stop, also in the middle of a run, which the next call continues.
        root: Folder of data sets that lie in one.
        device: The device to compute on.

    Yields:
        What was done for each entry, in their order.

    Raises:
        BbmoeError: A mistake in a suite or in a results folder.
    """
    end = None if budget is None else time.monotonic() + budget
    known = read_results(results)
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


def save_new(entry: Entry, output: Path, results: Path, known: Mapping[str, Record]) -> Path | None:
    """Write the results folder of an entry's suite, if any finished run of the suite is not in it; return it then."""
    folder = entry.folder(results)
    there = read_known([folder]) if (folder / MANIFEST).exists() else {}
    found = ResultSet.from_runs(entry.whole, output, {**known, **there})
    if all(record.digest in there for record in found.finished()):
        return None
    save_results(found, folder)
    return folder


def read_results(results: Path) -> dict[str, Record]:
    """Read the finished records of all results folders below a folder, by digest; none if it does not exist.

    Raises:
        RecordError: One of them is damaged, or the folder is a file.
    """
    if results.exists() and not results.is_dir():
        raise RecordError(f"--results {results}: expected a folder, found a file")
    return read_known(sorted(file.parent for file in results.rglob(MANIFEST)))
