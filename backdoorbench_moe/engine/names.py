"""Names of parts: where they are registered, and those of a spec checked before anything heavy is imported."""

from __future__ import annotations

from typing import Any

from backdoorbench_moe import applicators, data, defenses, models, triggers
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {
    "trigger": triggers.registry,
    "applicator": applicators.registry,
    "model": models.registry,
    "defense": defenses.registry,
    "dataset": data.registry,
}


def plugin_packages(spec: RunSpec) -> dict[str, str]:
    """The third-party packages that the parts of a spec come from, with their versions."""
    named = [("dataset", spec.dataset), ("model", spec.model), *(("defense", part) for part in spec.defenses)]
    named += [
        (kind, part) for kind, part in (("trigger", spec.trigger), ("applicator", spec.applicator)) if part
    ]
    found = [REGISTRIES[kind].candidate(part.name.partition(":")[0]) for kind, part in named]
    return {c.package: c.version for c in found if c is not None and not c.builtin}


def check_names(spec: RunSpec) -> None:
    """Check that every name in the spec can be looked up, importing nothing. Raises UnknownNameError."""
    data.registry.check_name(spec.dataset.name)
    models.registry.check_name(spec.model.name)
    if spec.trigger and spec.applicator:
        triggers.registry.check_name(spec.trigger.name)
        applicators.registry.check_name(spec.applicator.name)
    for part in spec.defenses:
        defenses.registry.check_name(part.name)
