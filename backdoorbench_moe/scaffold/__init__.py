"""Writing a package of new parts from templates. The package can be installed and passes the conformance tests."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from backdoorbench_moe import __version__
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.kinds import KINDS
from backdoorbench_moe.plugins import GROUPS, INTERFACE, INTERFACE_GROUP, normalize

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class PackagePlan:
    """A package to write.

    Attributes:
        package: Name of the package.
        kinds: The kinds of parts; the package has one part of each.
    """

    package: str
    kinds: tuple[str, ...]

    @property
    def module(self) -> str:
        """Name of the package's Python module."""
        return self.package.replace("-", "_")

    @property
    def part(self) -> str:
        """Name under which the parts are registered."""
        return self.package.removeprefix("bbmoe-")

    def class_name(self, kind: str) -> str:
        """Return the name of a part's class, such as StripesTrigger. It never starts with a digit."""
        words = self.package if self.part[0].isdigit() else self.part
        return "".join(word.capitalize() for word in (*words.split("-"), kind))


def plan_package(name: str, kinds: Sequence[str] = ("trigger",)) -> PackagePlan:
    """Check the name of a new package and the kinds of its parts. Nothing is written.

    Args:
        name: Name of the package.
        kinds: Kinds of parts, keys of `kinds.KINDS`.

    Raises:
        ConfigError: The name is not valid for pip or Python, or is used by a package, module or part.
        UnknownNameError: A kind is unknown.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError("--kind", kind, KINDS)
    plan = PackagePlan(name, tuple(kind for kind in KINDS if kind in kinds))
    if not NAME.fullmatch(name) or keyword.iskeyword(plan.module):
        raise ConfigError.expected(
            "name", "lower case letters, digits and single hyphens, as bbmoe-stripes", name
        )
    if taken := _taken(plan):
        raise ConfigError(f"name: expected one that is free, got {name!r}: {taken}")
    return plan


def write_package(plan: PackagePlan, output: Path) -> Path:
    """Write a package into a new folder. If writing fails, nothing remains.

    Args:
        plan: The package.
        output: Folder in which the package's folder is created.

    Returns:
        The package's folder.

    Raises:
        ConfigError: The package's folder exists, or `output` does not exist or cannot be written to.
    """
    target = output / plan.package
    if not output.is_dir():
        raise ConfigError.expected("--output", "an existing folder", str(output))
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: expected to write a new folder, but it exists")
    partial = None
    try:
        partial = Path(tempfile.mkdtemp(dir=output, prefix=f".{plan.package}-"))
        partial.chmod(0o755)
        for name, text in render_package(plan):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def render_package(plan: PackagePlan) -> Iterator[tuple[str, str]]:
    """Yield the path, relative to the package's folder, and the text of every file."""
    yield "setup.cfg", _render("setup.cfg", plan)
    yield "pyproject.toml", _render("pyproject.toml", plan)
    yield "README.md", _render("README.md", plan)
    yield f"{plan.module}/__init__.py", _render("init.py", plan)
    for kind in plan.kinds:
        yield f"{plan.module}/{kind}.py", _render(f"{kind}.py", plan, kind)
        yield f"tests/test_{kind}.py", _render(f"test_{kind}.py", plan, kind)


def _taken(plan: PackagePlan) -> str | None:
    """Return what uses the name of the package, its module or its parts; None if the names are free."""
    try:
        return f"a package of that name is installed ({version(plan.package)})"
    except PackageNotFoundError:
        pass
    spec = find_spec(plan.module)
    if spec is not None and spec.origin is not None:
        return f"there is a module {plan.module} ({spec.origin})"
    for kind in plan.kinds:
        for candidate in REGISTRIES[kind].offers():
            if normalize(candidate.name) == plan.part:
                return f"the {kind} {candidate.name!r} is taken by {candidate.origin}"
    return None


def _render(template: str, plan: PackagePlan, kind: str = "") -> str:
    from jinja2 import Environment, StrictUndefined

    text = (files(__name__) / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text).render(
        package=plan.package,
        module=plan.module,
        part=plan.part,
        kinds=plan.kinds,
        groups=GROUPS,
        class_names={each: plan.class_name(each) for each in plan.kinds},
        class_name=plan.class_name(kind) if kind else "",
        interface=INTERFACE,
        interface_group=INTERFACE_GROUP,
        least=__version__,
    )
