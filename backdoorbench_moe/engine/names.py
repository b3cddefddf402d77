"""Names in a spec, checked before anything heavy is imported."""

from __future__ import annotations

from backdoorbench_moe import applicators, data, defenses, models, triggers
from backdoorbench_moe.config import RunSpec


def check_names(spec: RunSpec) -> None:
    """Check that every name in the spec can be looked up, importing nothing. Raises UnknownNameError."""
    data.registry.check_name(spec.dataset.name)
    models.registry.check_name(spec.model.name)
    if spec.trigger and spec.applicator:
        triggers.registry.check_name(spec.trigger.name)
        applicators.registry.check_name(spec.applicator.name)
    for part in spec.defenses:
        defenses.registry.check_name(part.name)
