"""Check that a run's model still has the metrics in its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backdoorbench_moe.engine.measuring.evaluate import Metrics
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.errors import RecordError

# On a CPU, the same kernels and threads add in the same order, so that all predictions are equal. Otherwise, rounding
# may change the class of an image whose two largest logits are nearly equal.
SAME_SUMS = ("device", "precision", "threads", "cpu")
TOLERANCE = 0.01
METRICS = ("ba", "asr")


def check_same(
    run: Run, measured: Metrics, *, precision: str, environment: Mapping[str, Any] | None = None
) -> None:
    """Check that a run's model still has the BA and ASR in its record.

    This last check catches changes of the data, the trigger, the code or the model that other checks miss.

    Args:
        run: The run.
        measured: The current metrics on the same images.
        precision: The precision of this measurement. If it is not that of the run, nothing is checked.
        environment: The environment of this measurement, in the format of a record, if the batches were those of the
            run; otherwise None.

    Raises:
        RecordError: A metric differs. In the same environment on a CPU, no difference is allowed; otherwise, 1
            percentage point or 3 images, whichever is more.
    """
    record = run.record
    expected = unfiltered_metrics(run)
    if expected is None or precision != record.environment["precision"]:
        return
    same = environment is not None and _sums_alike(record.environment, environment)
    for name in METRICS:
        if name in expected and name in measured:
            then, now = expected[name], measured[name]
            allowed = 0.0 if same else max(100 * TOLERANCE, 300 / then["n"])
            if then["n"] != now["n"] or abs(then["value"] - now["value"]) > allowed + 1e-9:
                raise RecordError(
                    f"run folder {run.folder.path}: {name.upper()} in its record is {then['value']:.2f}% of "
                    f"{then['n']:g} images, but now it is {now['value']:.2f}% of {now['n']:g}: the data, the trigger, "
                    "plug-in code or the model has changed since the run"
                )


def _sums_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (
        one["device"] == "cpu"
        and all(one.get(key) == other.get(key) for key in SAME_SUMS)
        and one["packages"].get("torch") == other["packages"].get("torch")
    )


def unfiltered_metrics(run: Run) -> Mapping[str, Any] | None:
    """The metrics of the model in the run folder; None if they are unknown.

    With an input filter, the record contains the metrics of the model and the filter together.
    """
    record = run.record
    if not any(each["about"] == "input" for each in record.judgements):
        return record.metrics
    return None
