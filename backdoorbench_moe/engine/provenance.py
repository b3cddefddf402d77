"""What is known of an attack anywhere in the making of a model."""

from __future__ import annotations

from collections.abc import Iterable

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.graph import is_attacked
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.records import Record

# Key, and its values, in the header of a model file. "true" wins over "unknown", and that over "false".
BACKDOORED = "backdoored"
TRUE, UNKNOWN, FALSE = "true", "unknown", "false"


def backdoored(spec: RunSpec, record: Record, inputs: Iterable[Run]) -> str:
    """Say whether a model is backdoored: "true" if there is an attack anywhere in its making, as far as is known.

    A file of weights that does not say this of itself, in the header that this package writes, is "unknown", and so is
    what is made from it.

    Args:
        spec: The run's spec.
        record: The run's record, which says what its training started from.
        inputs: The runs that it is made from.
    """
    if is_attacked(spec):
        return TRUE
    said = {run.folder.model_metadata().get(BACKDOORED, UNKNOWN) for run in inputs}
    if (start := record.parts.get("model", {}).get("start")) is not None:
        said.add(start[BACKDOORED])
    return next((word for word in (TRUE, UNKNOWN) if word in said), FALSE)


def origin_of(run: Run) -> str:
    """Say whether the model of a finished run is backdoored, as the header of its file does."""
    return run.folder.model_metadata().get(BACKDOORED, UNKNOWN)
