"""Facts about an analyzed run, taken from its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backdoorbench_moe.engine.provenance import origin_of
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.records.sharing import without_folders

# Parts of a run's record that are copied. Judgements are left out, since they may contain a score for each image.
RECORD_PARTS = (
    *("spec", "data", "parts", "poison", "history", "stages", "timing", "seeds", "environment"),
    *("parent", "clean_twin", "near_chance"),
)


@dataclass(frozen=True)
class RunFacts:
    """Facts about an analyzed run.

    Attributes:
        name: Name of the run folder.
        digest: Digest of the run's spec.
        model: Name of the model.
        data: Name of the data set.
        data_digest: SHA-256 over the images and labels.
        attacked: Whether the model was attacked, with a trigger or without; None if that is not known, as for an
            imported model.
        metrics: The recorded metrics, in percent.
        record: Further parts of the run's record (see RECORD_PARTS), without local paths.
    """

    name: str
    digest: str
    model: str
    data: str
    data_digest: str
    attacked: bool | None
    metrics: dict[str, dict[str, float]]
    record: dict[str, Any]


def run_facts(run: Run) -> RunFacts:
    """Collect the facts about a run, without local paths, since reports are shared with others."""
    record, spec = run.record, run.spec
    values = {**without_folders(record), "parent": record.parent}
    return RunFacts(
        name=run.folder.path.name,
        digest=record.digest,
        model=spec.model.name,
        data=record.data["name"],
        data_digest=record.data["digest"],
        attacked=_attacked(run),
        metrics=values["metrics"],
        record={name: values[name] for name in RECORD_PARTS},
    )


def _attacked(run: Run) -> bool | None:
    """Return whether the model was attacked; None for an imported model whose file does not state it."""
    if not run.spec.imported:
        return run.spec.attacked
    return True if origin_of(run) == "true" else None
