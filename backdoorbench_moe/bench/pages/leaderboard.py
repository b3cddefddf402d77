"""The cells of several suites as rows of one table: attack, defense and model, with the measured metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backdoorbench_moe.bench.pages.found import Found, read_folder, read_runs
from backdoorbench_moe.bench.suites.suite import Cell, Suite, seedless_digest, value_of
from backdoorbench_moe.bench.tables.layout import NO_CELL, find_place, label
from backdoorbench_moe.bench.tables.record_metrics import with_recovery
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.statistic import interval_of
from backdoorbench_moe.bench.tables.tuning import uses_tuning
from backdoorbench_moe.collapse import FILTERED
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.config.spec import DEFAULT_ATTACK
from backdoorbench_moe.engine.graph import PARENT, needs
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.metrics import METRICS
from backdoorbench_moe.ops.intervals import Interval
from backdoorbench_moe.records import Record

# Metrics in the table of attacks and defenses.
COLUMNS = (
    "asr",
    "target_rate",
    "twin_asr",
    "ba",
    "ra",
    "asr_over_tuning",
    "ba_over_tuning",
    "auroc",
    "tpr",
    "fpr",
)
# Metrics of detectors that judge training images or classes instead of inputs.
JUDGEMENTS = {
    "auroc": ("sample_auroc",),
    "tpr": ("sample_tpr", "class_tpr"),
    "fpr": ("sample_fpr", "class_fpr"),
}
NO_DEFENSE = "none"


@dataclass(frozen=True)
class Value:
    """A metric of a cell.

    Attributes:
        mean: Mean over the seeds.
        interval: A 95% interval; see `interval_of`.
    """

    mean: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Setting:
    """The setting of a row.

    Attributes:
        data: Name of the data set.
        model: Name of the model.
        trigger: Name of the trigger; "none" for a clean model.
        applicator: Name of the applicator; "none" for a clean model.
        attack: Trigger, applicator, poison rate and other settings of the attack, in one line; "none" for a clean
            model.
        attack_options: Options of trigger and applicator, in one line.
        defense: The defenses in one line; "none" for an undefended model.
        defense_options: Options of the defenses, in one line.
    """

    data: str
    model: str
    trigger: str
    applicator: str
    attack: str
    attack_options: str
    defense: str
    defense_options: str


@dataclass(frozen=True)
class Row:
    """A cell of a suite.

    Attributes:
        setting: Its setting.
        suite: Label of the suite.
        seeds: Number of finished runs.
        wanted: Number of runs of the cell.
        state: "finished", or why there is nothing to show.
        values: The values of those of `COLUMNS` that were measured.
        states: Why there is no value, for each of the other columns.
        near_chance: Number of seeds whose model is near chance.
        records: The record of each finished seed.
    """

    setting: Setting
    suite: str
    seeds: int
    wanted: int
    state: str
    values: Mapping[str, Value]
    states: Mapping[str, str]
    near_chance: int
    records: Mapping[int, Found]


@dataclass(frozen=True)
class Board:
    """The results of several suites, which share their records.

    Attributes:
        results: The results of each suite.
        found: All finished records, by digest.
    """

    results: tuple[ResultSet, ...]
    found: Mapping[str, Found]

    def cells(self) -> list[tuple[ResultSet, Cell]]:
        """Return all cells, each once, from the suite that has most of its seeds."""
        best: dict[str, tuple[ResultSet, Cell]] = {}
        for results in self.results:
            for cell in results.suite.cells:
                key = seedless_digest(cell.spec)
                if key not in best or self._rank(results, cell) > self._rank(*best[key]):
                    best[key] = results, cell
        return list(best.values())

    def records(self, results: ResultSet, cell: Cell) -> dict[int, Found]:
        """Return the finished records of a cell, by seed."""
        runs = cell.runs(results.suite.repeats)
        return {spec.seed: self.found[spec.digest] for spec in runs if spec.digest in self.found}

    def _rank(self, results: ResultSet, cell: Cell) -> tuple[int, int]:
        return len(self.records(results, cell)), results.suite.repeats


def open_board(suites: Sequence[Suite], *, runs: Path, folders: Path | None = None) -> Board:
    """Read the results of several suites.

    Args:
        suites: The suites.
        runs: Folder of run folders; read unless `folders` is given.
        folders: Folder with a results folder SUITE/SCALE for each suite; a missing one counts as having no finished
            runs.

    Raises:
        ConfigError: A suite has mixtures of merged experts, which have other metrics.
        RecordError: A record or results folder is damaged, or a results folder is of another version of its suite.
    """
    found: dict[str, Found] = {}
    records: dict[str, Record] = {}
    for suite in suites:
        if any(cell.spec.mixture is not None for cell in suite.cells):
            raise ConfigError(
                f"suite {suite.label}: contains mixtures of merged experts, which have other metrics; "
                "use `bbmoe bench table`"
            )
        new = (
            read_runs(suite, runs) if folders is None else read_folder(suite, results_folder(suite, folders))
        )
        for digest, each in new.items():
            if each.record.status == "finished":
                found.setdefault(digest, each)
            elif digest not in found:
                records[digest] = each.record
    records |= {digest: each.record for digest, each in found.items()}
    defended: dict[str, list[Record]] = {}
    for record in records.values():
        if (parent := needs(record.run_spec).get(PARENT)) is not None:
            defended.setdefault(parent.digest, []).append(record)
    complete = [with_recovery(record, defended.get(digest, [])) for digest, record in records.items()]
    return Board(tuple(ResultSet.of(suite, complete) for suite in suites), found)


def results_folder(suite: Suite, folders: Path) -> Path:
    """Return the results folder of a suite in a folder of results folders."""
    return folders / suite.name if suite.scale is None else folders / suite.name / suite.scale


def rows(board: Board) -> list[Row]:
    """Return the rows of all cells that are attacked or undefended."""
    return [
        _row(board, results, cell)
        for results, cell in board.cells()
        if cell.spec.attacked or not cell.spec.defenses
    ]


def setting_of(spec: RunSpec) -> Setting:
    """Return the setting of a run."""
    spec = spec.without_folders()
    return Setting(
        spec.dataset.name,
        spec.model.name,
        "none" if spec.trigger is None else spec.trigger.name,
        "none" if spec.applicator is None else spec.applicator.name,
        *_attack(spec),
        " + ".join(part.name for part in spec.defenses) or NO_DEFENSE,
        _options(spec.defenses),
    )


def _attack(spec: RunSpec) -> tuple[str, str]:
    """Return the attack in one line, and the options of its parts."""
    if spec.attack is None:
        return "none", ""
    parts = [part for part in (spec.trigger, spec.applicator) if part is not None]
    said = [" by ".join(part.name for part in parts)]
    said += [label("poison.rate", spec.poison.rate)] if spec.poison.rate else []
    said += ["clean label"] if spec.poison.labels == "clean" else []
    said += ["all-to-all"] if spec.poison.mapping == "all-to-all" else []
    said += [f"source {value_of(spec, 'poison.source')}"] if spec.poison.source else []
    named = [] if spec.attack.name == DEFAULT_ATTACK else [spec.attack]
    return ", ".join(text for text in (*(part.name for part in named), *said) if text), _options(
        [*named, *parts]
    )


def _options(parts: Iterable[PartSpec]) -> str:
    """Return the options of some parts in one line."""
    return ", ".join(f"{key}={value}" for part in parts for key, value in part.options.items())


def _row(board: Board, results: ResultSet, cell: Cell) -> Row:
    records = board.records(results, cell)
    values: dict[str, Value] = {}
    states: dict[str, str] = {}
    near = 0
    for column in COLUMNS:
        key = _measured_key(column, records)
        place = find_place(results, cell, key)
        if place.statistic is None:
            states[column] = place.state if _expected(column, cell.spec, records) else NO_CELL
            continue
        near = max(near, place.statistic.near_chance if column in ("ba", "asr") else 0)
        runs = (spec for spec in cell.runs(results.suite.repeats) if spec.seed in records)
        each = [row for spec in runs if (row := results.metric(spec, key)) is not None]
        values[column] = Value(place.statistic.mean, interval_of(each, place.statistic.interval))
    return Row(
        setting=setting_of(cell.spec),
        suite=results.suite.label,
        seeds=len(records),
        wanted=results.suite.repeats,
        state="finished" if records else results.state(cell),
        values=values,
        states=states,
        near_chance=near,
        records=records,
    )


def _measured_key(column: str, records: Mapping[int, Found]) -> str:
    """Return the key of the metric in a column; for detectors that do not filter inputs, that of their judgement."""
    measured = {key for each in records.values() for key in each.record.metrics if key in METRICS}
    return next((key for key in (column, *JUDGEMENTS.get(column, ())) if key in measured), column)


def _expected(column: str, spec: RunSpec, records: Mapping[int, Found]) -> bool:
    """Whether a run of this kind can have a metric that is missing.

    Only detectors have an AUROC, TPR and FPR, and only attacked models an ASR. Behind an input filter, the target rate
    without the trigger is not measured, and there is no comparison with tuning.
    """
    if column in JUDGEMENTS:
        return False
    behind_filter = any(FILTERED in each.record.metrics for each in records.values())
    if column == "target_rate" or uses_tuning(column):
        return spec.attacked and not behind_filter
    return column == "ba" or spec.attacked
