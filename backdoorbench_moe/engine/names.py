"""The registries of all kinds of parts, and checks of the names in a spec."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backdoorbench_moe.config import SAME, TWIN, RunSpec
from backdoorbench_moe.engine.graph import surrogate_of
from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.kinds import KINDS, PACKAGE
from backdoorbench_moe.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {
    name: import_module(f"{PACKAGE}.{kind.room}").registry for name, kind in KINDS.items()
}


def plugin_packages(spec: RunSpec) -> dict[str, str]:
    """Return the versions, by name, of the third-party packages that provide parts of a spec."""
    found = [REGISTRIES[kind].candidate(part.name.partition(":")[0]) for kind, part in spec.parts()]
    return {c.package: c.version for c in found if c is not None and not c.builtin}


def plugin_sources(spec: RunSpec) -> dict[str, str]:
    """Hash the Python code of every third-party part of a spec.

    Returns:
        The first 16 hexadecimal digits of SHA-256 hashes. For a package, by its name, over the .py files of the
        top-level packages or modules that contain its parts. For a part that was registered in this process, by kind
        and name, such as "trigger mark", over the source code of its methods; left out if there is no source code.
    """
    modules: dict[str, set[str]] = {}
    registered = {}
    for kind, part in spec.parts():
        name = part.name.partition(":")[0]
        candidate = REGISTRIES[kind].candidate(name)
        if candidate is None:
            registered[f"{kind} {name}"] = _hash_methods(REGISTRIES[kind].lookup(name))
        elif not candidate.builtin:
            module = candidate.target.partition(":")[0].partition(".")[0]
            modules.setdefault(candidate.package, set()).add(module)
    found = {package: _hash_code(sorted(names)) for package, names in modules.items()}
    return found | {name: code for name, code in registered.items() if code is not None}


def _hash_methods(part: type) -> str | None:
    # Not the source of the class, which Python cannot find for a class in a notebook.
    methods = [value for value in vars(part).values() if inspect.isfunction(value)]
    try:
        source = "\0".join(inspect.getsource(method) for method in methods)
    except OSError:
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _hash_code(modules: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        origin = find_spec(module)
        if origin is not None and origin.origin is not None:
            file = Path(origin.origin)
            folder = file.parent
            for path in sorted(folder.rglob("*.py")) if file.name == "__init__.py" else [file]:
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_names(spec: RunSpec) -> None:
    """Check that every part of a spec is registered, without importing the parts.

    Raises:
        UnknownNameError: There is no part with this name.
        PluginError: A package provides the part, but cannot be used.
    """
    check_surrogate_name(spec)
    for kind, part in spec.parts():
        REGISTRIES[kind].check_name(part.name)


def check_part_options(spec: RunSpec) -> None:
    """Check the names and types of the options of every part of a spec, without building parts or reading data.

    Options of defenses are checked by `setups.defenses.build_defenses`, whose messages begin with the defense's name.

    Raises:
        UnknownNameError: A part has no such option.
        ConfigError: An option is missing or of the wrong type.
        PluginError: A part cannot be used.
    """
    for kind, part in spec.parts():
        if kind != "defense":
            REGISTRIES[kind].check(part.name, part.options)


def check_surrogate_name(spec: RunSpec) -> None:
    """Raise UnknownNameError if a trigger's surrogate is neither a model nor one of `SAME` and `TWIN`."""
    if (surrogate := surrogate_of(spec)) is None or spec.trigger is None:
        return
    known, name = REGISTRIES["model"].names(), surrogate.model.name
    if name.partition(":")[0] not in known and spec.trigger.options["surrogate"] == name:
        raise UnknownNameError("trigger.surrogate", name, [SAME, TWIN, *known])
