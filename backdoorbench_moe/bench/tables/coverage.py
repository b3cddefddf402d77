"""The finished and the missing runs of every cell of a suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from backdoorbench_moe.bench.suites.suite import value_of
from backdoorbench_moe.bench.tables.layout import label, varied_keys
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.wording.counting import count

MISSING = "missing"


@dataclass(frozen=True)
class CellRuns:
    """The runs of one cell.

    Attributes:
        labels: One label for each of `varied_keys`.
        finished: Digests of the finished runs, by seed.
        others: State of each other run ("missing", "failed", ...), by seed.
    """

    labels: tuple[str, ...]
    finished: Mapping[int, str]
    others: Mapping[int, str]


def cell_runs(results: ResultSet) -> Iterator[CellRuns]:
    """Yield the runs of every cell of a suite, in order."""
    keys = varied_keys(results.suite)
    for cell in results.suite.cells:
        finished, others = {}, {}
        for spec in cell.runs(results.suite.repeats):
            record = results.records.get(spec.digest)
            status = MISSING if record is None else record.status
            if status == "finished":
                finished[spec.seed] = spec.digest
            else:
                others[spec.seed] = status
        yield CellRuns(tuple(label(key, value_of(cell.spec, key)) for key in keys), finished, others)


def failures(results: ResultSet) -> list[str]:
    """List the names of the failed runs with their errors, including clean twins and runs that others depend on."""
    failed = (record for record in results.records.values() if record.status == "failed")
    return sorted(f"{record.run_spec.name}: {record.error}" for record in failed)


def missing_line(cells: list[CellRuns]) -> str:
    """Return a sentence about the missing runs."""
    empty = sum(not cell.finished for cell in cells)
    partial = sum(bool(cell.finished and cell.others) for cell in cells)
    parts = [
        *([f"no run of {count(empty, 'cell')} is finished"] if empty else []),
        *(
            [f"{count(partial, 'cell')} {'has' if partial == 1 else 'have'} fewer seeds than wanted"]
            if partial
            else []
        ),
    ]
    return (
        f"Of {count(len(cells), 'cell')}: {'; '.join(parts)}."
        if parts
        else "Nothing: every cell has all its seeds."
    )


def seeds_line(others: Mapping[int, str]) -> str:
    """Format the seeds that are not finished, by state: "3, 4 missing; 1 failed"."""
    by_state: dict[str, list[int]] = {}
    for seed, state in others.items():
        by_state.setdefault(state, []).append(seed)
    return "; ".join(f"{', '.join(map(str, seeds))} {state}" for state, seeds in by_state.items())
