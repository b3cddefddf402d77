"""Functions that run suites and read their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backdoorbench_moe.api.arguments import PathLike, path_of
from backdoorbench_moe.bench.pages.texts import FORMS, Form, tables_text
from backdoorbench_moe.bench.running.engines import Engine, make_engine
from backdoorbench_moe.bench.running.engines.serial import SerialEngine
from backdoorbench_moe.bench.running.plan import with_place
from backdoorbench_moe.bench.running.run import run_suite as run_missing
from backdoorbench_moe.bench.running.worker import Outcome
from backdoorbench_moe.bench.save import save_results
from backdoorbench_moe.bench.suites.reading import load_suite, parse_suite
from backdoorbench_moe.bench.suites.suite import Suite, order
from backdoorbench_moe.bench.tables.results import ResultSet, with_seeds
from backdoorbench_moe.bench.tables.tidy import tidy_rows
from backdoorbench_moe.durations import parse_budget
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.torch_state import default_torch_state
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.options import convert
from backdoorbench_moe.plain import plain

# Name of a suite that is given as a mapping.
UNNAMED = "suite"


@dataclass(frozen=True)
class SuiteResult:
    """Results of a suite. Notebooks show its tables.

    Attributes:
        results: The suite and its records.
        failed: The error message of each run that failed in this call, by the name of its folder.
        only: The filters by which cells of the suite were selected.
    """

    results: ResultSet
    failed: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Names of the unfinished runs, including clean twins."""
        return [s.name for s in order(self.results.suite) if self.results.record(s) is None]

    def table(self, form: Form = "markdown", *, intervals: bool = False) -> str:
        """Return the tables of the suite as text, as `bbmoe bench table --format` prints them.

        Args:
            form: "markdown", "latex", "csv" (one row for each cell and metric) or "html" (the complete report).
            intervals: Whether Markdown and LaTeX tables have 95% intervals instead of standard deviations.

        Raises:
            UnknownNameError: The format does not exist.
        """
        if form not in FORMS:
            raise UnknownNameError("form", form, FORMS)
        return tables_text(self.results, form, intervals=intervals)

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict for each finished run, including clean twins, for a data frame.

        Keys are those of `tidy.csv`: the parts and settings, each metric with its 95% interval (`asr`, `asr_low`,
        `asr_high`) and number of images (`asr_n`; `cad` has neither), and the environment. Values that
        a run does not have are None.
        """
        return tidy_rows(self.results)

    def save(self, folder: PathLike) -> list[Path]:
        """Write or update a results folder: records, tables, plots and the report.

        Returns:
            The files of the folder.

        Raises:
            ConfigError: The results are those of a part of the suite.
            RecordError: The folder is that of another suite, scale or version, or contains runs that these results
                lack.
        """
        if self.only:
            raise ConfigError("only: cannot be saved, as a results folder contains the complete suite")
        return save_results(self.results, path_of(folder, "folder"))

    def _repr_markdown_(self) -> str:
        return self.table()


@default_torch_state()
def run_suite(
    suite: PathLike | Mapping[str, Any],
    *,
    scale: str | None = None,
    only: Sequence[str] | str = (),
    repeats: int | None = None,
    output: PathLike = "runs",
    budget: float | str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    data_root: PathLike | None = None,
    download: bool | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> SuiteResult:
    """Run the unfinished runs of a suite, as `bbmoe bench run` does, and return its results.

    If the call is repeated, finished runs are reused and an interrupted run is continued. A failed run does not stop
    the others.

    Args:
        suite: Name of a built-in suite, path of a YAML file, or a dict with the content of such a file, in which
            `version` may be missing.
        scale: One of the suite's scales; the first by default.
        only: A string "key=value[,value]" or several; only the cells with these settings are run.
        repeats: Number of seeds per cell; that of the suite by default.
        output: Folder of run folders.
        budget: Time after which to stop, in seconds or as text such as "1h30m"; None for no limit.
        workers: Number of parallel processes. In a script, the call must then be below `if __name__ == "__main__":`. By
            default, the runs are executed in this process.
        threads: CPU threads of each worker process; by default, an equal share of the cores. Only with `workers`.
        data_root: Folder with the data set.
        download: Whether to download a missing data set.
        device: "auto", "cpu", "cuda" or "cuda:N"; that of the suite by default.
        observer: Receives a message for each run that has ended.

    Returns:
        The results; runs that are not finished are listed in `missing`.

    Raises:
        BbmoeError: The suite or an argument is invalid; nothing is trained.
    """
    observer, filters = observer or Observer(), _filters(only)
    read = _read(suite, scale).only(filters)
    read = read if repeats is None else read.with_repeats(convert(repeats, int, "repeats"))
    seconds = parse_budget(budget) if isinstance(budget, str) else convert(budget, float | None, "budget")
    given = {
        "root": None if data_root is None else str(path_of(data_root, "data_root")),
        "download": download,
    }
    read = with_place(read, {key: value for key, value in given.items() if value is not None}, device)
    runs, failed = path_of(output, "output"), {}

    def on_outcome(outcome: Outcome) -> None:
        observer.on_message(f"{outcome.status}: {outcome.name}")
        if outcome.status == "failed":
            failed[outcome.name] = str(outcome.error)

    run_missing(read, _engine(workers, threads, device), output=runs, budget=seconds, on_outcome=on_outcome)
    return SuiteResult(ResultSet.from_runs(read, runs), failed, filters)


def read_suite(
    suite: PathLike | Mapping[str, Any],
    *,
    scale: str | None = None,
    only: Sequence[str] | str = (),
    repeats: int | None = None,
    output: PathLike = "runs",
    results: PathLike | None = None,
) -> SuiteResult:
    """Read the results of a suite without running anything, as `bbmoe bench table` does.

    Args:
        suite: See `run_suite`.
        scale: See `run_suite`.
        only: See `run_suite`.
        repeats: Number of seeds per cell; by default that of the suite or, with `results`, of that folder.
        output: Folder of run folders.
        results: A results folder, as written by `SuiteResult.save`; read instead of run folders.

    Raises:
        BbmoeError: The suite or an argument is invalid, or a record is damaged.
    """
    folder, filters = None if results is None else path_of(results, "results"), _filters(only)
    wanted = None if repeats is None else convert(repeats, int, "repeats")
    whole = with_seeds(_read(suite, scale), wanted, folder)
    read = whole.only(filters)
    if folder is None:
        return SuiteResult(ResultSet.from_runs(read, path_of(output, "output")), only=filters)
    found = ResultSet.from_folder(whole, folder)
    return SuiteResult(replace(found, suite=read), only=filters)


def _read(suite: PathLike | Mapping[str, Any], scale: str | None) -> Suite:
    if isinstance(suite, Mapping):
        return parse_suite({"version": 1, **_as_yaml(suite)}, UNNAMED, scale)
    return load_suite(str(path_of(suite, "suite", "the name or path of a suite, or a dict")), scale)


def _as_yaml(value: Any) -> Any:
    """Convert values to those of a YAML file: numbers of other libraries, ranges and tuples, and any mappings."""
    value = plain(value)
    if isinstance(value, Mapping):
        return {key: _as_yaml(item) for key, item in value.items()}
    return [_as_yaml(item) for item in value] if isinstance(value, list | tuple) else value


def _filters(only: Sequence[str] | str) -> tuple[str, ...]:
    return (only,) if isinstance(only, str) else tuple(only)


def _engine(workers: int | None, threads: int | None, device: str | None) -> Engine:
    if workers is not None:
        threads = None if threads is None else convert(threads, int, "threads")
        return make_engine(workers=convert(workers, int, "workers"), threads=threads, device=device)
    if threads is not None:
        raise ConfigError(
            "threads: expected workers with it; in this process, torch.set_num_threads sets the number of threads"
        )
    return SerialEngine()
