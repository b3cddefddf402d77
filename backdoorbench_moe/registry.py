"""Registries, which look up parts by name. A part is a class of one kind, such as a trigger or a model.

The module of a part is imported only when the part is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from backdoorbench_moe.allocation import refusing_sizes
from backdoorbench_moe.errors import BbmoeError, ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.kinds import KINDS, PACKAGE
from backdoorbench_moe.options import Option, call_fault, check_options, convert, list_options
from backdoorbench_moe.plugins import Candidate, discover, strays

T = TypeVar("T")


class Registry(Generic[T]):
    """The parts of one kind, by name.

    Args:
        kind: Name of the kind, a key of `kinds.KINDS`.

    Attributes:
        kind: The same name.
        given: Keyword arguments that the caller of `create` passes, such as "num_classes" for models. Users cannot set
            them as options. A part may name others in its class attribute `data_options`, as language models do.
        needs: Options that every part of the kind must have.
    """

    def __init__(self, kind: str) -> None:
        row = KINDS[kind]
        self.kind = kind
        self.given, self.needs = row.given, row.needs
        self._base = row.base
        self._local: dict[str, type[T]] = {}
        self._loaded: dict[Candidate, type[T]] = {}

    @cached_property
    def _found(self) -> tuple[dict[str, Candidate], dict[Candidate, str]]:
        """The usable entry points by name, and the reason for each refused one; nothing is imported.

        An entry point is refused if its package does not support this version of the interfaces, or if another usable
        entry point already has its name.
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
        """Return all names that can be looked up, sorted; nothing is imported."""
        return sorted({*self._found[0], *self._local})

    def name_of(self, part: type) -> str:
        """Return the name of a part that was looked up; the name of the class if it is not registered."""
        loaded = {found: candidate.name for candidate, found in self._loaded.items()}
        local = {found: name for name, found in self._local.items()}
        return {**loaded, **local}.get(part, part.__name__)

    def candidate(self, name: str) -> Candidate | None:
        """Return the usable entry point with this name.

        Returns:
            The entry point; None if the part was added by `register` or does not exist.
        """
        return self._found[0].get(name)

    def offers(self) -> list[Candidate]:
        """Return all entry points of the kind, including refused ones; nothing is imported."""
        return [*self._found[0].values(), *self._found[1]]

    def fault(self, candidate: Candidate) -> str | None:
        """Return why an entry point cannot be used, or None if it can. Parts that are not refused are imported."""
        if candidate in self._found[1]:
            return self._found[1][candidate]
        try:
            self._load(candidate)
        except PluginError as error:
            return str(error)
        return None

    def broken(self) -> dict[Candidate, str]:
        """Import all third-party parts, and return the reason for each entry point that cannot be used."""
        reasons = {c: self.fault(c) for c in self.offers() if not c.builtin}
        return {candidate: reason for candidate, reason in reasons.items() if reason}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers a part in the current process.

        Installed packages register their parts by entry points instead.

        Args:
            name: Name of the part.

        Raises:
            ConfigError: The name is taken, or the class does not implement the interface.
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
        """Remove a part that `register` added."""
        self._local.pop(name, None)

    def lookup(self, name: str) -> type[T]:
        """Import and return a part.

        Args:
            name: Name of the part, or "family:argument", such as "timm:resnet18", where the family is the name of the
                part and the argument is the value of one of its options.

        Raises:
            UnknownNameError: There is no part of this name; similar names are suggested.
            PluginError: The part cannot be imported, or does not implement the interface.
        """
        if not isinstance(name, str):
            raise ConfigError.expected(self.kind, "a name", name)
        family = name.partition(":")[0]
        if family in self._local:
            return self._local[family]
        candidate = self._found[0].get(family)
        if candidate is None:
            raise self._unknown(name)
        return self._load(candidate)

    def check_name(self, name: str) -> str:
        """Return the name if it can be looked up; nothing is imported.

        Raises:
            UnknownNameError: There is no part of this name; similar names are suggested.
            PluginError: The entry point of this name was refused.
        """
        if name.partition(":")[0] not in self.names():
            raise self._unknown(name)
        return name

    def options(self, name: str) -> dict[str, Option]:
        """Return the options of a part by name, without the option that "family:argument" sets."""
        part, implied = self.lookup(name), self._implied(name)
        return list_options(part, given=(*self._given(part), *implied))

    def check(self, name: str, options: Mapping[str, object]) -> dict[str, Any]:
        """Check the options of a part without building it.

        Returns:
            The options that are set, with converted values, including the one that "family:argument" sets.

        Raises:
            UnknownNameError: There is no such part or option.
            ConfigError: An option is missing, of the wrong type or out of range.
            PluginError: The part cannot be used.
        """
        part, implied = self.lookup(name), self._implied(name)
        where, known = f"{self.kind} {name!r}", list_options(part)
        checked = check_options(part, options, where=where, given=(*self._given(part), *implied))
        for option, argument in implied.items():
            checked[option] = convert(argument, known[option].annotation, f"{where}: {option}")
        return checked

    def create(
        self, name: str, options: Mapping[str, object], given: Mapping[str, object] | None = None
    ) -> T:
        """Build a part.

        Args:
            name: Name of the part, as in `lookup`.
            options: The user's options, by name.
            given: Keyword arguments for the part; those that the part is not given (see `Registry.given`) are ignored.

        Raises:
            UnknownNameError: There is no such part or option.
            ConfigError: An option is missing, of the wrong type or out of range, or the part does not fit into memory.
            PluginError: The part cannot be used, or its constructor raised an unexpected exception.
        """
        part = self.lookup(name)
        taken = {key: value for key, value in (given or {}).items() if key in self._given(part)}
        checked = self.check(name, options)
        try:
            with refusing_sizes(f"{self.kind} {name!r}: does not fit into memory with these options"):
                return cast(Callable[..., T], part)(**taken, **checked)
        except (BbmoeError, OSError):
            raise
        # Such as those of third-party parts, or of torch for sizes that do not match.
        except (Exception, SystemExit) as error:
            raise self._not_built(name, error) from error

    def _not_built(self, name: str, error: BaseException) -> BbmoeError:
        candidate = self.candidate(name.partition(":")[0])
        reason = (str(error).strip() or "no message").splitlines()[0]
        message = f"cannot be built with these options: {type(error).__name__}: {reason}"
        if candidate is None or candidate.builtin:
            return ConfigError(f"{self.kind} {name!r}: {message}")
        return PluginError(f"{self.kind} {name!r} from {candidate.origin}: {message}")

    def _given(self, part: object) -> tuple[str, ...]:
        return tuple(getattr(part, "data_options", self.given))

    def _implied(self, name: str) -> dict[str, str]:
        """Return the option that "family:argument" sets, as {name: argument}; an empty dict for a name without ":".

        The class attribute `name_argument` holds the name of this option.
        """
        family, colon, argument = name.partition(":")
        option = getattr(self.lookup(name), "name_argument", None)
        if colon and option is None:
            raise ConfigError(f"{self.kind} {family!r}: does not take ':{argument}' after its name")
        return {option: argument} if colon and option else {}

    def _unknown(self, name: str) -> BbmoeError:
        """Return the error for a name that cannot be looked up: a PluginError if its entry point was refused."""
        for candidate, reason in self._found[1].items():
            if candidate.name == name.partition(":")[0]:
                return PluginError(reason)
        # Parts that do not load are not looked for, as their names are known.
        broken = self._found[1] or strays()
        hint = "; see `bbmoe list` for broken plug-ins" if broken else ""
        return UnknownNameError(self.kind, name, self.names(), hint)

    def _load(self, candidate: Candidate) -> type[T]:
        # Cached: a suite looks up its parts thousands of times.
        if candidate not in self._loaded:
            part = candidate.load()
            if fault := self._misfit(part):
                raise PluginError(f"{self.kind} {candidate.name!r} from {candidate.origin}: {fault}")
            self._loaded[candidate] = cast(type[T], part)
        return self._loaded[candidate]

    def _misfit(self, part: object) -> str | None:
        """Return why an object is not a part of the kind, or None if it is one."""
        module, _, name = self._base.partition(":")
        if not isinstance(part, type) or not issubclass(part, getattr(import_module(module), name)):
            return f"{part!r} is not a subclass of {self._base}"
        named = getattr(part, "data_options", ())
        if not isinstance(named, tuple | list) or not all(isinstance(each, str) for each in named):
            return f"{part.__name__}: data_options: expected a tuple of names, got {named!r}"
        if fault := call_fault(part, given=self._given(part), needs=self.needs):
            return fault
        argument, options = getattr(part, "name_argument", None), list_options(part, given=self._given(part))
        if "name" in options:
            return f"{part.__name__}: option 'name': expected another name, since specs have that of the part there"
        if argument is not None and argument not in [*options]:
            return f"{part.__name__}: name_argument: expected the name of an option, got {argument!r}"
        return None


def registry_of(kind: str) -> Registry[Any]:
    """Import the module of a kind and return its registry."""
    return cast(Registry[Any], import_module(f"{PACKAGE}.{KINDS[kind].room}").registry)
