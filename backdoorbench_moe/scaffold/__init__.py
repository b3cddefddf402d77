"""A package of new parts, written from templates: installs and passes the conformance tests as it is."""

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
class Plan:
    """A package to be written: its name, and the kinds of which it has a part each."""

    package: str
    kinds: tuple[str, ...]

    @property
    def module(self) -> str:
        """Its name in Python."""
        return self.package.replace("-", "_")

    @property
    def part(self) -> str:
        """The name its parts are registered under."""
        return self.package.removeprefix("bbmoe-")

    def class_name(self, kind: str) -> str:
        """Such as StripesTrigger; of a part whose name begins with a digit, with the package's name before it."""
        words = self.package if self.part[0].isdigit() else self.part
        return "".join(word.capitalize() for word in (*words.split("-"), kind))


def plan_package(name: str, kinds: Sequence[str] = ("trigger",)) -> Plan:
    """Check the name of a new package and the kinds of its parts; nothing is written.

    Raises ConfigError for a name that pip or Python would not take, or that a package, a module or a part
    has already; UnknownNameError for an unknown kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError("--kind", kind, KINDS)
    plan = Plan(name, tuple(kind for kind in KINDS if kind in kinds))
    if not NAME.fullmatch(name) or keyword.iskeyword(plan.module):
        raise ConfigError.expected(
            "name", "lower case letters, digits and single hyphens, as bbmoe-stripes", name
        )
    if taken := _taken(plan):
        raise ConfigError(f"name: expected one that is free, got {name!r}: {taken}")
    return plan


def write_package(plan: Plan, output: Path) -> Path:
    """Write the package into a new folder of its name in `output`, all or nothing; returns that folder.

    Raises ConfigError if the folder is there, or `output` is not or cannot be written to.
    """
    target = output / plan.package
    if not output.is_dir():
        raise ConfigError.expected("--output", "a folder that is there", str(output))
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: is there already; expected to write a new folder")
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


def render_package(plan: Plan) -> Iterator[tuple[str, str]]:
    """Every file of the package: its path in the package's folder, and its text."""
    yield "setup.cfg", _render("setup.cfg", plan)
    yield "pyproject.toml", _render("pyproject.toml", plan)
    yield "README.md", _render("README.md", plan)
    yield f"{plan.module}/__init__.py", _render("init.py", plan)
    for kind in plan.kinds:
        yield f"{plan.module}/{kind}.py", _render(f"{kind}.py", plan, kind)
        yield f"tests/test_{kind}.py", _render(f"test_{kind}.py", plan, kind)


def _taken(plan: Plan) -> str | None:
    """What has the package's name, its module's or its parts'; None if they are free."""
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


def _render(template: str, plan: Plan, kind: str = "") -> str:
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
