"""Errors shown to users; the command line prints them in one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from backdoorbench_moe.wording.spelling import near_names

# Most characters of a value of several lines in an error message.
LONGEST_GOT = 80


class BbmoeError(Exception):
    """Base class of all errors that this package raises deliberately."""


class ConfigError(BbmoeError):
    """A parameter has an invalid value."""

    @classmethod
    def expected(cls, parameter: str, expected: str, got: object) -> ConfigError:
        """Build the standard message: the parameter, what was expected, and what was received."""
        return cls(f"{parameter}: expected {expected}, got {_in_one_line(repr(got))}")


def _in_one_line(text: str) -> str:
    """Shorten a text of several lines, such as that of a module or a tensor, to one line."""
    if "\n" not in text:
        return text
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_GOT else f"{line[:LONGEST_GOT]}..."


class UnknownNameError(ConfigError):
    """A name is unknown; the message suggests similar names and lists up to `LISTED` known ones."""

    LISTED = 50

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = near_names(name, known)
        advice = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        listed = ", ".join(known[: self.LISTED]) or "none"
        more = f", and {len(known) - self.LISTED} more" if len(known) > self.LISTED else ""
        super().__init__(f"{what}: unknown {name!r}; {advice}known: {listed}{more}{hint}")
        self.name = name
        self.known = known
        self.suggestions = near


class PluginError(BbmoeError):
    """A third-party package does not implement the interface, or cannot be imported."""


class ShapeError(BbmoeError):
    """A tensor does not have the expected shape, type or range."""


class DataError(BbmoeError):
    """A data set is missing, damaged, or not the expected one."""


class RecordError(BbmoeError):
    """A run folder, record or model file is missing, damaged, in use, or was not written by this package."""


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Prefix the messages of errors with a parameter that the code raising them does not know.

    Args:
        parameter: Name of the parameter, such as "base".
    """
    try:
        yield
    except BbmoeError as error:
        kinds = (ConfigError, PluginError, ShapeError, DataError, RecordError, BbmoeError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{parameter}: {error}") from error


class BbmoeWarning(UserWarning):
    """A message to the user that does not stop the run."""
