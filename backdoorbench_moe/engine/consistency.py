"""Whether a run's model still gives the numbers of its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backdoorbench_moe.engine.evaluate import Metrics
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.errors import RecordError

# Where the same sums are made, every prediction is the same. Elsewhere rounding may change the class of an image whose
# two largest logits are nearly equal.
SAME_SUMS = ("device", "precision", "threads", "cpu")
TOLERANCE = 0.01
METRICS = ("ba", "asr")


def check_same(
    run: Run, measured: Metrics, *, precision: str, environment: Mapping[str, Any] | None = None
) -> None:
    """Check that a run's model gives the BA and ASR of its record again.

    It is the net under all other checks: whatever has changed since, data, trigger, code or model, would show here.

    Args:
        run: The run.
        measured: What was measured now, on the same images.
        precision: What it was measured in; in another precision than the run's nothing is checked.
        environment: What it was computed with, as a record has it, if the same batches were passed; else None.

    Raises:
        RecordError: A number is another one: at all in the same environment, else by more than 1% of the images.
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
                    f"run folder {run.folder.path}: its record says {name.upper()} {then['value']:.2f}% of "
                    f"{then['n']:g} images, measured again it is {now['value']:.2f}% of {now['n']:g}: something that "
                    "the run was made with has changed (data, trigger, plug-in code or model)"
                )


def _sums_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in SAME_SUMS) and (
        one["packages"].get("torch") == other["packages"].get("torch")
    )


def unfiltered_metrics(run: Run) -> Mapping[str, Any] | None:
    """The metrics of the model in the folder; None if they are not known.

    Behind an input filter the last stage's metrics are those of model and filter together.
    """
    record = run.record
    if not any(each["about"] == "input" for each in record.judgements):
        return record.metrics
    return None
