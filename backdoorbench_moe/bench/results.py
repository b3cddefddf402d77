"""The finished runs of a suite, read from run folders or a results folder, and the statistics of a cell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backdoorbench_moe.bench.life_sign import is_fresh, read_life_sign
from backdoorbench_moe.bench.paper import PaperTable, load_paper
from backdoorbench_moe.bench.suite import Cell, Suite, order
from backdoorbench_moe.config import DATASET_NOT_IN_DIGEST, RunSpec
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.ops.metrics import mean_interval, mean_std
from backdoorbench_moe.records import Record, RunFolder, parse_record

MANIFEST, RECORDS = "suite.json", "records.jsonl"
ROUNDING = 1e-9


@dataclass(frozen=True)
class Statistic:
    """One metric of one cell over its seeds, in percent, beside the paper's.

    std: sample standard deviation. low, high: 95% interval of the mean over seeds (Student's t). Both None
    for a single seed. paper: the published mean, None where there is none.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float | None
    low: float | None
    high: float | None
    paper: float | None = None

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def difference(self) -> float | None:
        """Mean minus the paper's value, in percentage points."""
        return None if self.paper is None else self.mean - self.paper

    @property
    def inside(self) -> bool | None:
        """Whether the paper's value lies inside our 95% interval; None where either is missing."""
        if self.paper is None or self.low is None or self.high is None:
            return None
        # Equal shares of unlike counts differ in their last bit.
        return self.low - ROUNDING <= self.paper <= self.high + ROUNDING


@dataclass(frozen=True)
class ResultSet:
    """Records of a suite by digest, its clean twins' among them, finished or not."""

    suite: Suite
    records: Mapping[str, Record]
    paper: PaperTable

    @classmethod
    def from_runs(
        cls, suite: Suite, output: Path | str, known: Mapping[str, Record] | None = None
    ) -> ResultSet:
        """Read what there is of a suite in a folder of run folders.

        known: finished records by digest, as `read_known` gives them; they count where no run folder is
        finished. Raises RecordError if there is no such folder (and nothing known), for a damaged record, and for
        runs of one data set that were made from different data.
        """
        known = known or {}
        if not known and not Path(output).is_dir():
            raise RecordError(f"--output {output}: expected a folder of run folders, found none")
        wanted = (spec.digest for spec in order(suite))
        kept = {digest: known[digest] for digest in wanted if digest in known}
        found = {record.digest: record for record in _read_folders(suite, Path(output))}
        kept |= {k: record for k, record in found.items() if record.status == "finished" or k not in kept}
        return cls._of(suite, kept.values())

    @classmethod
    def from_folder(cls, suite: Suite, folder: Path | str) -> ResultSet:
        """Read a results folder. Raises RecordError if it is none, or of another version of the suite."""
        folder = Path(folder)
        check_manifest(suite, folder)
        wanted = {spec.digest for spec in order(suite)}
        return cls._of(suite, (record for record in read_lines(folder) if record.digest in wanted))

    @classmethod
    def _of(cls, suite: Suite, records: Iterable[Record]) -> ResultSet:
        found = {record.digest: record for record in records}
        digests: dict[str, tuple[str, str]] = {}
        for record in found.values():
            if record.status == "finished":
                spec, digest = record.run_spec, record.data["digest"]
                # The same data set with the same options must be the same images.
                key = json.dumps(
                    {k: v for k, v in spec.dataset.to_dict().items() if k not in DATASET_NOT_IN_DIGEST}
                )
                other, name = digests.setdefault(key, (digest, spec.name))
                if other != digest:
                    raise RecordError(
                        f"runs {name} and {spec.name}: were made from different {spec.dataset.name} data"
                    )
        return cls(suite, found, load_paper(suite))

    def record(self, spec: RunSpec) -> Record | None:
        """The finished record of a spec; None where there is none."""
        record = self.records.get(spec.digest)
        return record if record is not None and record.status == "finished" else None

    def finished(self) -> list[Record]:
        """The finished records in the suite's order, twins last."""
        specs = sorted(order(self.suite), key=lambda spec: not spec.attacked)
        return [record for spec in specs if (record := self.record(spec)) is not None]

    def values(self, cell: Cell, metric: str) -> dict[int, float]:
        """Seed -> percent of every finished run of a cell that has the metric."""
        found = {}
        for spec in cell.runs(self.suite.repeats):
            if (value := self.value(spec, metric)) is not None:
                found[spec.seed] = value
        return found

    def statistic(self, cell: Cell, metric: str) -> Statistic | None:
        """The metric over the cell's seeds; None where no run is finished, or none has it."""
        found = self.values(cell, metric)
        if not found:
            return None
        values = tuple(found.values())
        mean, std = mean_std(values)
        low, high = mean_interval(values)
        return Statistic(tuple(found), values, mean, std, low, high, self.paper.value(cell.spec, metric))

    def state(self, cell: Cell) -> str:
        """In a word why a cell has no numbers: "missing", "failed", "running" or "interrupted"."""
        records = (self.records.get(spec.digest) for spec in cell.runs(self.suite.repeats))
        states = [record.status for record in records if record is not None]
        return next(
            (state for state in ("finished", "failed", "running", "interrupted") if state in states),
            "missing",
        )

    def value(self, spec: RunSpec, metric: str) -> float | None:
        """A metric of one run in percent; None where the run is not finished or has none."""
        stage, _, name = metric.rpartition(".")
        if name == "cad":
            # From the twin itself, so that a table does not hang on which run was linked last.
            twin, ba = self.record(clean_twin(spec)), self.value(spec, f"{stage}.ba" if stage else "ba")
            return None if twin is None or ba is None else twin.metrics["ba"]["value"] - ba
        found = self.metric(spec, metric)
        return None if found is None else found["value"]

    def metric(self, spec: RunSpec, metric: str) -> Mapping[str, float] | None:
        """A metric of one run as its record has it, {"value", "n", "low", "high"}; None where it has none."""
        record = self.record(spec)
        stage, _, name = metric.rpartition(".")
        if record is None:
            return None
        if name == "seconds":
            return _seconds(record, stage)
        return (_stage(record, stage) if stage else record.metrics).get(name)


def check_manifest(suite: Suite, folder: Path) -> None:
    """Raise RecordError unless a results folder is of this very suite, scale and version."""
    manifest = read_manifest(folder)
    for key, ours in (("suite", suite.name), ("scale", suite.scale)):
        if manifest.get(key) != ours:
            raise RecordError(
                f"results folder {folder}: expected {key} {ours!r}, found {manifest.get(key)!r}"
            )
    if manifest.get("version") != suite.version:
        raise RecordError(
            f"results folder {folder}: is of version {manifest.get('version')} of suite {suite.name}, "
            f"which is now at version {suite.version}; draw it anew from the run folders, or use another folder"
        )
    if manifest.get("digest") != suite.digest:
        raise RecordError(
            f"results folder {folder}: its runs ({manifest.get('digest')}) are not those of suite {suite.name} "
            f"version {suite.version} ({suite.digest}): the suite was changed without a new version"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a results folder says of itself. Raises RecordError if it is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"results folder {folder}: expected a {MANIFEST} in it, found none") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"results folder {folder}: {MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise RecordError(f"results folder {folder}: {MANIFEST} is damaged: expected keys and values")
    return manifest


def manifest_of(results: ResultSet) -> dict[str, Any]:
    """What a results folder says of itself."""
    suite = results.suite
    return {
        "suite": suite.name,
        "version": suite.version,
        "scale": suite.scale,
        "digest": suite.digest,
        "title": suite.title,
        "note": suite.note,
        "repeats": suite.repeats,
        "cells": len(suite.cells),
        "finished": len(results.finished()),
    }


def record_lines(results: ResultSet) -> Iterator[str]:
    """Every finished record as a line of JSON, without where on that machine its data lay."""
    for record in results.finished():
        values = record.to_dict()
        for key in DATASET_NOT_IN_DIGEST:
            values["spec"]["dataset"].pop(key, None)
        yield json.dumps(values)


def read_lines(folder: Path) -> list[Record]:
    """The records of a results folder. Raises RecordError if they are missing or damaged."""
    file = folder / RECORDS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [parse_record(json.loads(line), file) for line in lines]
    except (OSError, ValueError) as error:
        raise RecordError(f"results folder {folder}: {RECORDS} is missing or damaged: {error}") from error


def read_known(folders: Iterable[Path | str]) -> dict[str, Record]:
    """The records of results folders, of any suites and scales, by digest; of equals, the first folder's.

    A digest stands for all that decides a run's numbers, so suites may share what they have in common. Raises
    RecordError for a folder that is none, or is damaged.
    """
    found: dict[str, Record] = {}
    for folder in map(Path, folders):
        read_manifest(folder)
        for record in read_lines(folder):
            if record.status == "finished":
                found.setdefault(record.digest, record)
    return found


def _read_folders(suite: Suite, output: Path) -> Iterator[Record]:
    for spec in order(suite):
        if (folder := RunFolder(output / spec.name)).exists:
            record = folder.read()
            if record.status == "running" and not is_fresh(read_life_sign(folder.path)):
                record.status = "interrupted"
            yield record


def _seconds(record: Record, stage: str) -> Mapping[str, float] | None:
    """What a stage took; or the whole defense; or, of an undefended run, its training."""
    if stage:
        found = next((each["seconds"] for each in record.stages if each["name"] == stage), None)
    else:
        found = record.timing.get("defense_seconds" if record.stages else "train_seconds")
    return None if found is None else {"value": found}


def _stage(record: Record, name: str) -> Mapping[str, Any]:
    return next((stage["metrics"] for stage in record.stages if stage["name"] == name), {})
