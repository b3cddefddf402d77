"""Names to parts. Targets are lazy: looking a name up imports that part and no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from backdoorbench_moe.errors import BbmoeError, ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.kinds import KINDS
from backdoorbench_moe.options import Option, call_fault, check_options, list_options
from backdoorbench_moe.plugins import Candidate, discover

T = TypeVar("T")


class Registry(Generic[T]):
    """The parts of one kind, by name.

    Args:
        kind: Name of the kind, a row of `kinds.KINDS`. The class that its parts subclass is imported only when a
            part is.
    """

    def __init__(self, kind: str) -> None:
        row = KINDS[kind]
        self.kind = kind
        self.given, self.needs = row.given, row.needs
        self._base = row.base
        self._local: dict[str, type[T]] = {}

    @cached_property
    def _found(self) -> tuple[dict[str, Candidate], dict[Candidate, str]]:
        """Entry points by name, and those refused without an import, with the reason.

        A package for another version of the interface holds no name against one that works.
        """
        names: dict[str, Candidate] = {}
        refused: dict[Candidate, str] = {}
        for candidate in discover(self.kind):
            if candidate.mismatch:
                refused[candidate] = candidate.mismatch
                continue
            holder = names.setdefault(candidate.name, candidate)
            if holder is not candidate:
                refused[candidate] = f"the name {candidate.name!r} is taken by {holder.origin}"
        return names, refused

    def names(self) -> list[str]:
        """Every name that can be looked up, sorted; nothing is imported."""
        return sorted({*self._found[0], *self._local})

    def candidate(self, name: str) -> Candidate | None:
        """The entry point behind `name`; None where it was registered from running code."""
        return self._found[0].get(name)

    def offers(self) -> list[Candidate]:
        """Every entry point of the kind, usable or not; nothing is imported."""
        return [*self._found[0].values(), *self._found[1]]

    def fault(self, candidate: Candidate) -> str | None:
        """Why an entry point cannot be used; None where it can. Imports it unless it is refused before."""
        if candidate in self._found[1]:
            return self._found[1][candidate]
        try:
            self._load(candidate)
        except PluginError as error:
            return str(error)
        return None

    def broken(self) -> dict[Candidate, str]:
        """Third-party entry points that cannot be used, each with its reason. Imports third-party parts."""
        reasons = {c: self.fault(c) for c in self.offers() if not c.builtin}
        return {candidate: reason for candidate, reason in reasons.items() if reason}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: offer a part under `name` in this process (a package uses entry points).

        Raises ConfigError if the name is taken or the class does not keep to the interface.
        """

        def add(part: type[T]) -> type[T]:
            if name in self.names():
                raise ConfigError(f"{self.kind} {name!r}: the name is already taken")
            if fault := self._misfit(part):
                raise ConfigError(f"{self.kind} {name!r}: {fault}")
            self._local[name] = part
            return part

        return add

    def unregister(self, name: str) -> None:
        """Take back what `register` added."""
        self._local.pop(name, None)

    def lookup(self, name: str) -> type[T]:
        """Import and return the part called `name` ("family:argument" finds the family).

        Raises UnknownNameError with near names, or PluginError where its package is at fault.
        """
        family = name.partition(":")[0]
        if family in self._local:
            return self._local[family]
        candidate = self._found[0].get(family)
        if candidate is None:
            raise self._unknown(name)
        return self._load(candidate)

    def check_name(self, name: str) -> str:
        """Return `name` if it can be looked up; nothing is imported. Raises UnknownNameError or PluginError."""
        if name.partition(":")[0] not in self.names():
            raise self._unknown(name)
        return name

    def options(self, name: str) -> dict[str, Option]:
        """The options `create` takes for `name`, without those that the name itself gives."""
        part, implied = self.lookup(name), self._implied(name)
        return list_options(part, given=(*self.given, *implied))

    def check(self, name: str, options: Mapping[str, object]) -> dict[str, Any]:
        """Check options for `name` and return all keyword arguments, without building anything."""
        part, implied = self.lookup(name), self._implied(name)
        where = f"{self.kind} {name!r}"
        return {**check_options(part, options, where=where, given=(*self.given, *implied)), **implied}

    def create(
        self, name: str, options: Mapping[str, object], given: Mapping[str, object] | None = None
    ) -> T:
        """Build the part called `name` from the user's options, checked, and what the caller gives."""
        return cast(Callable[..., T], self.lookup(name))(**(given or {}), **self.check(name, options))

    def _implied(self, name: str) -> dict[str, str]:
        """What "family:argument" says: the option the family names in `name_argument`."""
        family, colon, argument = name.partition(":")
        option = getattr(self.lookup(name), "name_argument", None)
        if colon and option is None:
            raise ConfigError(f"{self.kind} {family!r}: takes no ':{argument}' behind its name")
        return {option: argument} if colon and option else {}

    def _unknown(self, name: str) -> BbmoeError:
        """The error for a name that cannot be looked up: a package's fault where one offers it."""
        for candidate, reason in self._found[1].items():
            if candidate.name == name.partition(":")[0]:
                return PluginError(reason)
        return UnknownNameError(self.kind, name, self.names())

    def _load(self, candidate: Candidate) -> type[T]:
        part = candidate.load()
        if fault := self._misfit(part):
            raise PluginError(f"{self.kind} {candidate.name!r} from {candidate.origin}: {fault}")
        return cast(type[T], part)

    def _misfit(self, part: object) -> str | None:
        """Why something is no part of the kind; None where it is one."""
        module, _, name = self._base.partition(":")
        if not isinstance(part, type) or not issubclass(part, getattr(import_module(module), name)):
            return f"{part!r} is no subclass of {self._base}"
        return call_fault(part, given=self.given, needs=self.needs)
