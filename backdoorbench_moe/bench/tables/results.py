"""The records of a suite, read from run folders or from a results folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backdoorbench_moe.bench.suites.paper import PaperTable, load_paper
from backdoorbench_moe.bench.suites.suite import Cell, Suite, order, seedless_digest
from backdoorbench_moe.bench.tables.record_metrics import (
    base_of,
    find_value,
    is_of_collapsed_model,
    uses_twin,
    with_base,
)
from backdoorbench_moe.bench.tables.statistic import Sample, Statistic, drop_interval, interval_of
from backdoorbench_moe.bench.tables.tuning import compared_key, plain_tuning, uses_tuning
from backdoorbench_moe.collapse import FILTERED
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.graph import clean_twin, poisoned_experts
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.metrics import metric as find_metric
from backdoorbench_moe.ops.intervals import Interval, paired_interval
from backdoorbench_moe.records import Record, RunFolder, parse_record
from backdoorbench_moe.records.sharing import without_folders
from backdoorbench_moe.records.status import status_of

MANIFEST, RECORDS = "suite.json", "records.jsonl"
# Key of the manifest.
CLEAN_CELLS = "clean_cells"
# Shares measured on the two groups of images that an AUROC compares.
GROUPS = {"auroc": ("tpr", "fpr"), "sample_auroc": ("sample_tpr", "sample_fpr")}


@dataclass(frozen=True)
class ResultSet:
    """The records of a suite.

    Args:
        suite: The suite.
        records: Records by digest, finished or not, including those of the clean twins.
        paper: The published table of the suite; empty if it has none.
    """

    suite: Suite
    records: Mapping[str, Record]
    paper: PaperTable

    @classmethod
    def from_runs(
        cls, suite: Suite, output: Path | str, known: Mapping[str, Record] | None = None
    ) -> ResultSet:
        """Read the runs of a suite from a folder of run folders.

        Args:
            suite: The suite.
            output: The folder of run folders. Runs of the suite that are not in it are missing in the result.
            known: Finished records by digest, as returned by `read_known`; used if the folder has no finished run.

        Raises:
            RecordError: The folder does not exist and nothing is known, a record is damaged, or runs on one data set
                used different data.
        """
        known = known or {}
        if not known and not Path(output).is_dir():
            got = "got a file" if Path(output).exists() else "found none"
            raise RecordError(f"--output {output}: expected a folder of run folders, {got}")
        wanted = (spec.digest for spec in order(suite))
        kept = {digest: known[digest] for digest in wanted if digest in known}
        found = {record.digest: record for record in _read_folders(suite, Path(output))}
        kept |= {k: record for k, record in found.items() if record.status == "finished" or k not in kept}
        return cls.of(suite, kept.values())

    @classmethod
    def from_folder(cls, suite: Suite, folder: Path | str) -> ResultSet:
        """Read a results folder.

        Raises:
            RecordError: It is not a results folder, or that of another suite, scale or version.
        """
        folder = Path(folder)
        check_manifest(suite, folder)
        wanted = {spec.digest for spec in order(suite)}
        return cls.of(suite, (record for record in read_lines(folder) if record.digest in wanted))

    @classmethod
    def of(cls, suite: Suite, records: Iterable[Record]) -> ResultSet:
        """Combine a suite with records, which may include those of other suites.

        Raises:
            RecordError: Runs on one data set used different data.
        """
        found = {record.digest: record for record in records}
        digests: dict[str, tuple[str, str]] = {}
        for record in found.values():
            if record.status == "finished":
                spec, digest = record.run_spec, record.data["digest"]
                # A data set with the same options and files must contain the same images.
                files = {key: known for key, known in spec.files.items() if key.startswith("dataset.")}
                key = json.dumps([spec.without_folders().dataset.to_dict(), files])
                other, name = digests.setdefault(key, (digest, spec.name))
                if other != digest:
                    raise RecordError(
                        f"runs {name} and {spec.name}: were made from different {spec.dataset.name} data"
                    )
        return cls(suite, found, load_paper(suite))

    def record(self, spec: RunSpec) -> Record | None:
        """Get the finished record of a spec; None if the run is not finished."""
        record = self.records.get(spec.digest)
        return record if record is not None and record.status == "finished" else None

    def finished(self) -> list[Record]:
        """List the finished records in the suite's order, clean twins last."""
        specs = sorted(order(self.suite), key=lambda spec: not spec.attacked)
        return [record for spec in specs if (record := self.record(spec)) is not None]

    def measured(self, metric: str) -> bool:
        """Return whether any finished run has a metric."""
        return any(self.value(record.run_spec, metric) is not None for record in self.finished())

    def values(self, cell: Cell, metric: str) -> dict[int, float]:
        """Get a metric of the finished runs of a cell that have it, by seed."""
        found = {}
        for spec in cell.runs(self.suite.repeats):
            if (value := self.value(spec, metric)) is not None:
                found[spec.seed] = value
        return found

    def statistic(self, cell: Cell, metric: str) -> Statistic | None:
        """Compute the statistics of a metric over a cell's seeds; None if no finished run has the metric."""
        found = self.values(cell, metric)
        if not found:
            return None
        specs = [spec for spec in cell.runs(self.suite.repeats) if spec.seed in found]
        interval = self._interval(specs, metric)
        sample = self._sample(specs, metric)
        return Statistic.of(
            found,
            interval,
            self.paper.value(cell.spec, metric),
            self.paper.rounding(cell.spec, metric),
            sum(self._near_chance(spec, metric) for spec in specs),
            interval_of([self.metric(spec, metric) or {} for spec in specs], interval),
            sample.images if sample.is_of_images(find_metric(metric)) else 0,
        )

    def state(self, cell: Cell) -> str:
        """Return "finished" if any run of a cell is finished, else "failed", "running", "interrupted" or "missing"."""
        records = (self.records.get(spec.digest) for spec in cell.runs(self.suite.repeats))
        states = [record.status for record in records if record is not None]
        return next(
            (state for state in ("finished", "failed", "running", "interrupted") if state in states),
            "missing",
        )

    def value(self, spec: RunSpec, metric: str) -> float | None:
        """Get a metric of one run, in its unit; None if the run is not finished or does not have the metric."""
        if base_of(metric) == "cad":
            # Computed, not read from the record: the twin may have been linked again since.
            twin, ba = (self.value(spec, with_base(metric, name)) for name in ("twin_ba", "ba"))
            return None if twin is None or ba is None else twin - ba
        if uses_tuning(metric):
            own, tuned = self._beside_tuning(spec, compared_key(metric))
            return None if own is None or tuned is None else own - tuned
        found = self.metric(spec, metric)
        return None if found is None else found["value"]

    def metric(self, spec: RunSpec, metric: str) -> Mapping[str, float] | None:
        """Get a metric of one run from its record.

        Args:
            spec: Spec of the run.
            metric: Key of the metric, such as "asr", "task/2.ba" or "pruned.asr".

        Returns:
            {"value", "n", "low", "high"}; for "seconds" only {"value"}; None if the run is not finished
            or does not have the metric.
        """
        record = self.record(spec)
        if record is None:
            return None
        if base_of(metric) == "twin_ba":
            twin = self.record(clean_twin(spec))
            # The twin has no defense stages, but the same parts of the data, such as "task/2".
            parts = [text for text in metric.split(".")[:-1] if "/" in text]
            return None if twin is None else twin.metrics.get(".".join([*parts, "ba"]))
        if metric == "alone_asr":
            return self._alone(spec)
        return find_value(record, metric)

    def _beside_tuning(self, spec: RunSpec, metric: str) -> tuple[float | None, float | None]:
        """Return a metric of a defended run and of plain tuning; None if missing, or behind an input filter."""
        tuned, record = plain_tuning(spec), self.record(spec)
        if tuned is None or record is None or FILTERED in record.metrics:
            return None, None
        return self.value(spec, metric), self.value(tuned, metric)

    def has_tuning(self, cell: Cell) -> bool:
        """Return whether plain tuning instead of a cell's last defense is finished for any seed."""
        tuned = [plain_tuning(spec) for spec in cell.runs(self.suite.repeats)]
        return any(spec is not None and self.record(spec) is not None for spec in tuned)

    def _alone(self, spec: RunSpec) -> Mapping[str, float] | None:
        """Return the mean ASR of a mixture's poisoned experts before merging; None unless all of them are finished."""
        experts = poisoned_experts(spec) if spec.mixture is not None and spec.mixture.task is None else []
        found = [self.metric(expert, "asr") for expert in experts]
        known = [row for row in found if row is not None]
        if not known or len(known) < len(found):
            return None
        mean = sum(row["value"] for row in known) / len(known)
        return known[0] if len(known) == 1 else {"value": mean, "n": min(row["n"] for row in known)}

    def has_twin(self, cell: Cell) -> bool:
        """Return whether the clean twin of any finished run of a cell is finished."""
        specs = cell.runs(self.suite.repeats)
        return any(self.record(spec) and self.record(clean_twin(spec)) for spec in specs)

    def _interval(self, specs: list[RunSpec], metric: str) -> Interval | None:
        """Return the 95% interval of a metric's mean over these runs."""
        if base_of(metric) == "cad":
            ba, twin_ba = (self._sample(specs, with_base(metric, name)) for name in ("ba", "twin_ba"))
            return drop_interval(ba, twin_ba)
        if uses_tuning(metric):
            return self._over_tuning(specs, compared_key(metric))
        return self._sample(specs, metric).interval(find_metric(metric))

    def _over_tuning(self, specs: list[RunSpec], metric: str) -> Interval | None:
        """Return the 95% interval of the mean difference of defenses to plain tuning of the same models."""
        pairs = [self._beside_tuning(spec, metric) for spec in specs]
        having = [(tuned, own) for own, tuned in pairs if own is not None and tuned is not None]
        sample = self._sample(specs, metric)
        if not having or not sample.is_of_images(find_metric(metric)):
            return None
        return paired_interval([tuned for tuned, _ in having], [own for _, own in having], sample.images)

    def _sample(self, specs: list[RunSpec], metric: str) -> Sample:
        """Return the values of a metric for those of these runs that have it."""
        having = [(spec, row) for spec in specs if (row := self.metric(spec, metric)) is not None]
        values = tuple(row["value"] for _, row in having)
        return Sample(values, min((self._images(spec, metric) for spec, _ in having), default=0))

    def _images(self, spec: RunSpec, metric: str) -> int:
        """Return the number of images that determines the uncertainty of a run's metric."""
        if base_of(metric) in GROUPS:
            # Its variance is at most A (1 - A) divided by the size of the smaller group (Birnbaum and Klose, 1957).
            groups = [self.metric(spec, with_base(metric, name)) for name in GROUPS[base_of(metric)]]
            counts = [int(group["n"]) for group in groups if group is not None]
            if len(counts) == len(groups):
                return min(counts)
        row = self.metric(spec, metric) or {}
        return int(row.get("n", 0))

    def _near_chance(self, spec: RunSpec, metric: str) -> bool:
        """Whether the model on which a metric is measured, or the twin it is compared with, is near chance."""
        record = self.record(spec)
        if record is None:
            return False
        found = is_of_collapsed_model(record, metric)
        if uses_tuning(metric):
            tuned = plain_tuning(spec)
            found |= tuned is not None and self._near_chance(tuned, compared_key(metric))
        if uses_twin(metric):
            twin = clean_twin(spec)
            found |= twin.digest != spec.digest and self._near_chance(twin, "ba")
        return found


def check_manifest(suite: Suite, folder: Path) -> None:
    """Check that a results folder belongs to this suite, scale and version.

    Raises:
        RecordError: It does not.
    """
    manifest = read_manifest(folder)
    for key, ours in (("suite", suite.name), ("scale", suite.scale)):
        if manifest.get(key) != ours:
            raise RecordError(
                f"results folder {folder}: expected {key} {ours!r}, found {manifest.get(key)!r}"
            )
    if manifest.get("version") != suite.version:
        raise RecordError(
            f"results folder {folder}: is of version {manifest.get('version')} of suite {suite.name}, "
            f"which is now at version {suite.version}; redraw it from the run folders, or use another folder"
        )
    if manifest.get("digest") != suite.digest:
        raise RecordError(
            f"results folder {folder}: its runs ({manifest.get('digest')}) are not those of suite {suite.name} "
            f"version {suite.version} ({suite.digest}): the suite was changed without a new version"
        )


def with_seeds(suite: Suite, repeats: int | None, folder: Path | None) -> Suite:
    """Return a suite with a number of seeds per cell.

    Args:
        suite: The suite.
        repeats: Number of seeds; None for that of the results folder, so that all of its runs are shown.
        folder: A results folder of the suite; if it is None or does not exist, the suite keeps its own number.

    Raises:
        ConfigError: `repeats` is below 1.
        RecordError: The manifest of the folder is damaged.
    """
    if repeats is not None:
        return suite.with_repeats(repeats)
    if folder is None or not (folder / MANIFEST).is_file():
        return suite
    found = read_manifest(folder).get("repeats", suite.repeats)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise RecordError(
            f"results folder {folder}: {MANIFEST} is damaged: repeats: expected an integer of at least 1, "
            f"got {found!r}"
        )
    return suite.with_repeats(found)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a results folder.

    Raises:
        RecordError: The manifest is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        found = "got a file" if folder.is_file() else "found none"
        raise RecordError(f"results folder {folder}: expected a {MANIFEST} in it, {found}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"results folder {folder}: {MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise RecordError(f"results folder {folder}: {MANIFEST} is damaged: expected a mapping")
    return manifest


def manifest_of(results: ResultSet) -> dict[str, Any]:
    """Build the manifest of a results folder.

    Clean runs can be cells of a suite or twins of attacked cells. The manifest lists the digests of the clean cells, if
    any, so that readers without the suite can distinguish them.
    """
    suite = results.suite
    clean = [seedless_digest(cell.spec) for cell in suite.cells if not cell.spec.attacked]
    return {
        "suite": suite.name,
        "version": suite.version,
        "scale": suite.scale,
        "digest": suite.digest,
        "title": suite.title,
        "note": suite.note,
        "repeats": suite.repeats,
        "cells": len(suite.cells),
        **({CLEAN_CELLS: clean} if clean else {}),
        "finished": len(results.finished()),
    }


def record_lines(results: ResultSet) -> Iterator[str]:
    """Yield every finished record as a line of JSON, without paths of this machine (see `records.sharing`)."""
    for record in results.finished():
        yield json.dumps(without_folders(record))


def read_lines(folder: Path) -> list[Record]:
    """Read the records of a results folder.

    Raises:
        RecordError: The records are missing or damaged.
    """
    file = folder / RECORDS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [parse_record(json.loads(line), file) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"results folder {folder}: {RECORDS} is missing or damaged: {error}") from error


def read_known(folders: Iterable[Path | str]) -> dict[str, Record]:
    """Read the finished records in results folders of any suites and scales.

    A digest covers everything that determines a run's numbers, so suites can share runs.

    Returns:
        Records by digest; for a digest in several folders, that of the first.

    Raises:
        RecordError: A folder is damaged, or not a results folder.
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
            yield replace(record, status=status_of(folder, record))
