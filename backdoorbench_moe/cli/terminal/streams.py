"""Standard output and error in any encoding, closed, or on a full disk."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from pathlib import Path

import click

# Replacements of the non-ASCII characters that are printed, for terminals that do not use UTF-8.
STAND_INS = {
    **{"–": "-", "−": "-", "━": "-", "─": "-", "│": "|", "×": "x", "²": "2"},
    **{"“": '"', "”": '"', "±": "+-", "…": "...", "→": "->", "†": "*", "§": "section", "∞": "inf"},
    "\N{NO-BREAK SPACE}": " ",
}


def prepare_streams() -> None:
    """Make printing safe for all characters, and for streams that were closed before the start.

    A character that the encoding lacks is printed as a similar one, or else as "?"; this includes bytes of a file name
    that are not valid text.
    """
    codecs.register_error("stand-in", _stand_in)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="stand-in")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(STAND_INS.get(letter, "?") for letter in missing), error.end


def echo(text: str, *, nl: bool = True) -> None:
    """Print to standard output in the stream's encoding; `click.echo` writes UTF-8 to a stream declared as ASCII."""
    click.echo(text, nl=nl, file=sys.stdout)


def say(text: str) -> None:
    """Print a line to standard error; errors in writing are ignored."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(text, file=sys.stderr)


def give_up_stdout() -> None:
    """Discard pending standard output, so that Python does not try to write it again at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
