"""Names of parts: the registries of all kinds, and checks on the names in a spec that import nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.kinds import KINDS, PACKAGE
from backdoorbench_moe.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {
    name: import_module(f"{PACKAGE}.{kind.room}").registry for name, kind in KINDS.items()
}


def plugin_packages(spec: RunSpec) -> dict[str, str]:
    """The third-party packages that the parts of a spec come from, with their versions."""
    found = [REGISTRIES[kind].candidate(part.name.partition(":")[0]) for kind, part in spec.parts()]
    return {c.package: c.version for c in found if c is not None and not c.builtin}


def check_names(spec: RunSpec) -> None:
    """Raise UnknownNameError for a part of the spec that cannot be looked up; nothing is imported."""
    for kind, part in spec.parts():
        REGISTRIES[kind].check_name(part.name)
