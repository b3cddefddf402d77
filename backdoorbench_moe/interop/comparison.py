"""Comparing the metrics of an imported result with those of BackdoorBench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.errors import DataError
from backdoorbench_moe.interop.result_folder import TEST_IMAGES, ResultFolder

# Percentage points by which a metric may differ from BackdoorBench's.
TOLERANCE = 0.5


@dataclass(frozen=True)
class Comparison:
    """A metric measured here, and BackdoorBench's value.

    Attributes:
        name: "ba", "asr" or "ra".
        here: The value measured here, in percent.
        there: The value in BackdoorBench's folder, in percent; None if there is none.
    """

    name: str
    here: float
    there: float | None


@dataclass(frozen=True)
class Imported:
    """An imported result.

    Attributes:
        run: The finished run.
        compared: BA, ASR and RA.
        source: The CSV file with BackdoorBench's metrics; None if there is none.
    """

    run: Run
    compared: tuple[Comparison, ...]
    source: Path | None


def compare(run: Run, place: ResultFolder) -> Imported:
    """Compare a run's metrics with BackdoorBench's. Raises DataError if one differs by more than `TOLERANCE`."""
    found = place.own_numbers()
    theirs, source = ({}, None) if found is None else found
    compared = tuple(Comparison(name, run.value(name), theirs.get(name)) for name in ("ba", "asr", "ra"))
    far = [c for c in compared if c.there is not None and abs(c.here - c.there) > TOLERANCE]
    if far:
        numbers = ", ".join(f"{c.name.upper()} {c.here:.2f}% here and {c.there:.2f}% there" for c in far)
        raise DataError(
            f"{source}: the run {run.folder.path} has other numbers: {numbers}. Look at: {_advice(far)}"
        )
    return Imported(run, compared, source)


def _advice(far: list[Comparison]) -> str:
    names = {c.name for c in far}
    if names == {"ba"}:
        return "the clean test images (--data-root, their size and how they were resized); the triggered ones agree"
    if "ba" not in names:
        return f"the images in {TEST_IMAGES}, which may be of another run than the weights; the clean accuracy agrees"
    return "the weights, which may be of another epoch than the csv's last row, and the normalisation of the images"
