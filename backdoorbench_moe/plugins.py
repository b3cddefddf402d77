"""Entry points of built-in and third-party parts."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import PurePath

from backdoorbench_moe.errors import BbmoeError, PluginError
from backdoorbench_moe.kinds import KINDS, PACKAGE
from backdoorbench_moe.wording.spelling import near_names

GROUPS = {name: kind.group for name, kind in KINDS.items()}

# Version of the interfaces that plug-ins implement. Changes that break plug-ins increase it.
INTERFACE = 2
# Entry-point group in which a package declares the versions of the interfaces that it supports: each entry point is
# named after one version, such as "2". A package that declares none is assumed to support the installed version.
INTERFACE_GROUP = f"{PACKAGE}.interface"
RECIPE_GROUP = f"{PACKAGE}.recipes"
OWN_GROUPS = (*GROUPS.values(), INTERFACE_GROUP, RECIPE_GROUP)


@dataclass(frozen=True)
class Candidate:
    """An entry point of an installed package. `load` imports the part.

    Args:
        kind: Kind of the part, such as "trigger".
        name: Name of the part.
        target: The part, as "module:Class".
        package: Name of the package.
        version: Version of the package.
        interfaces: Versions of the interfaces that the package supports; empty if it does not declare any.
    """

    kind: str
    name: str
    target: str
    package: str
    version: str
    interfaces: tuple[str, ...] = ()

    @property
    def builtin(self) -> bool:
        """Whether the part is in a module of `backdoorbench_moe`."""
        return self.target.startswith(f"{PACKAGE}.")

    @property
    def origin(self) -> str:
        """Name and version of the package, for messages and lists."""
        return f"{self.package} {self.version}".strip()

    @property
    def mismatch(self) -> str | None:
        """Why the package does not work with this version of the interfaces, or None if it does."""
        if not self.interfaces or str(INTERFACE) in self.interfaces:
            return None
        written = " or ".join(self.interfaces)
        return (
            f"{self.kind} {self.name!r} from {self.origin} is written for interface {written}; "
            f"this {PACKAGE} has interface {INTERFACE}"
        )

    def load(self) -> object:
        """Import the part.

        Raises:
            PluginError: The package does not support this version of the interfaces, or the import raised any
                exception, including `SystemExit`. The message names the package and the reason.
        """
        if self.mismatch:
            raise PluginError(self.mismatch)
        try:
            return EntryPoint(self.name, self.target, GROUPS[self.kind]).load()
        except (Exception, SystemExit) as error:
            missing = unmet_requirements(self.package) if isinstance(error, ImportError) else []
            names = ", ".join(missing)
            advice = f"; {self.package} requires packages that are not installed: {names}" if missing else ""
            raise PluginError(
                f"{self.kind} {self.name!r} from {self.origin} does not load: "
                f"{type(error).__name__}: {error}{advice}"
            ) from error


def discover(kind: str, name: str | None = None) -> list[Candidate]:
    """Return all entry points of a kind, or those with one name: built-in first, then by package and name."""
    points = entry_points(group=GROUPS[kind])
    found = set()
    for point in points if name is None else points.select(name=name):
        package, version = _owner(point)
        interfaces = _interfaces(point.dist) if point.dist else ()
        found.add(Candidate(kind, point.name, point.value, package, version, interfaces))
    return sorted(found, key=lambda c: (not c.builtin, c.package, c.name, c.target))


def strays(package: str | None = None) -> list[tuple[Candidate, str]]:
    """Return the entry points in misspelt groups, whose names begin with "backdoorbench_moe" but are unknown.

    The comparison ignores case and does not distinguish "-", "_" and ".".

    Args:
        package: Name of the package whose entry points are returned; None for all packages.

    Returns:
        Each entry point with an error message that suggests a group.
    """
    found = []
    for group in sorted(entry_points().groups):
        name, own = normalize(group), normalize(PACKAGE)
        if (name == own or name.startswith(f"{own}-")) and group not in OWN_GROUPS:
            advice = _group_advice(group)
            for point in entry_points(group=group):
                candidate = Candidate("entry point", point.name, point.value, *_owner(point))
                found.append((candidate, f"unknown group {group!r}; {advice}"))
    return [stray for stray in found if package is None or normalize(stray[0].package) == normalize(package)]


def _group_advice(group: str) -> str:
    """Suggest a group for an unknown one. Only the ends of the names are compared, as all have the same beginning."""
    ends = {known.removeprefix(f"{PACKAGE}."): known for known in OWN_GROUPS}
    near = near_names(normalize(group).removeprefix(f"{normalize(PACKAGE)}-"), ends, most=1)
    return f"did you mean {ends[near[0]]!r}?" if near else f"known: {', '.join(OWN_GROUPS)}"


def normalize(package: str) -> str:
    """Normalise the name of a package as pip does ("My_Pkg" to "my-pkg")."""
    return re.sub(r"[-_.]+", "-", package).lower()


def unmet_requirements(package: str) -> list[str]:
    """Return the names of the requirements of an installed package that are not installed.

    Versions are not compared. Requirements with an environment marker (after ";") are ignored.
    """
    try:
        requirements = distribution(package).requires or []
    except PackageNotFoundError:
        return []
    missing = []
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        if name and ";" not in requirement:
            try:
                distribution(name[0])
            except PackageNotFoundError:
                missing.append(name[0])
    return missing


def describe_error(error: BaseException) -> str:
    """Describe an exception that ended a run.

    Returns:
        The message of a `BbmoeError`. For any other exception, its type and its message, and where in the code of a
        third-party package it was raised, if it was.
    """
    if isinstance(error, BbmoeError):
        return str(error)
    place = raised_in(error)
    return f"{type(error).__name__}: {error}" + (f" (raised in {place})" if place else "")


def raised_in(error: BaseException) -> str | None:
    """Return the innermost function of a third-party package with parts that an exception passed; None if none.

    Returns:
        The function, the package and the line, such as "Stripes.stamp of bbmoe-stripes 0.1, bbmoe_stripes.py:12".
    """
    parts = [part for kind in GROUPS for part in discover(kind) if not part.builtin]
    origins = {re.split("[.:]", part.target)[0]: part.origin for part in parts}
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        origin = origins.get(str(frame.f_globals.get("__name__")).partition(".")[0])
        if origin is not None:
            code = frame.f_code
            return f"{code.co_qualname} of {origin}, {PurePath(code.co_filename).name}:{line}"
    return None


def _owner(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the package of an entry point; "unknown" and "" if its metadata is missing or damaged."""
    try:
        return (point.dist.name or "unknown", point.dist.version or "") if point.dist else ("unknown", "")
    except (AttributeError, KeyError, TypeError):  # The error depends on the version of Python.
        return "unknown", ""


def _interfaces(package: Distribution) -> tuple[str, ...]:
    return tuple(sorted(point.name for point in package.entry_points if point.group == INTERFACE_GROUP))
