"""Whether a model is known to be backdoored, from its run and the runs that it was built from."""

from __future__ import annotations

from collections.abc import Iterable

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.graph import is_attacked
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.records import Record

# Key and values in the header of a model file. "true" takes precedence over "unknown", and "unknown" over "false".
BACKDOORED = "backdoored"
TRUE, UNKNOWN, FALSE = "true", "unknown", "false"


def backdoored(spec: RunSpec, record: Record, inputs: Iterable[Run]) -> str:
    """Return "true" if the run, or any run that it was built from, has an attack; "unknown", or "false".

    The result is "unknown" if the run was built from a weight file without this information in its header, which this
    package writes.

    Args:
        spec: The run's spec.
        record: The run's record, which describes the weights that training started from.
        inputs: The runs that it is built from.
    """
    if is_attacked(spec):
        return TRUE
    said = {run.folder.model_metadata().get(BACKDOORED, UNKNOWN) for run in inputs}
    if (start := record.parts.get("model", {}).get("start")) is not None:
        said.add(start[BACKDOORED])
    return next((word for word in (TRUE, UNKNOWN) if word in said), FALSE)


def origin_of(run: Run) -> str:
    """Read from the header of a finished run's model file whether it is backdoored: "true", "unknown" or "false"."""
    return run.folder.model_metadata().get(BACKDOORED, UNKNOWN)
