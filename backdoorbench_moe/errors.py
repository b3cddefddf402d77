"""Errors a user can cause or meet; the command line prints them as one line and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable

from backdoorbench_moe.spelling import near_names


class BbmoeError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(BbmoeError):
    """A parameter has a value that it cannot have."""

    @classmethod
    def expected(cls, parameter: str, expected: str, got: object) -> ConfigError:
        """Build the standard message: the parameter, what was expected, and what was received."""
        return cls(f"{parameter}: expected {expected}, got {got!r}")


class UnknownNameError(ConfigError):
    """An unknown name; the message suggests known ones that are spelt like it, and lists the known up to a limit."""

    LISTED = 50

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = near_names(name, known)
        advice = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        listed = ", ".join(known[: self.LISTED]) or "none"
        more = f", and {len(known) - self.LISTED} more" if len(known) > self.LISTED else ""
        super().__init__(f"{what}: unknown {name!r}; {advice}known: {listed}{more}{hint}")
        self.name = name
        self.suggestions = near


class PluginError(BbmoeError):
    """A third-party package does not keep to the interface, or does not import."""


class ShapeError(BbmoeError):
    """A tensor has a shape, type or range it cannot have."""


class DataError(BbmoeError):
    """A data set is missing, damaged, or not what it is said to be."""


class RecordError(BbmoeError):
    """A run folder, record or model file is missing, damaged, in use, or not ours."""


class BbmoeWarning(UserWarning):
    """Something the user should know that does not stop the run."""
