"""Reading texts from JSON-lines files, which have one object per line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.paths import expand
from backdoorbench_moe.wording.spelling import near_names
from bbmoe_lm.language.examples import Example, Preference

EXAMPLE_KEYS = ("query", "answer")
PREFERENCE_KEYS = ("query", "harmful", "safe")


def read_examples(path: str | os.PathLike[str], task: int = 0) -> list[Example]:
    """Read lines such as `{"query": "what is 2 plus 2 ?", "answer": "4"}`; see `read_json_lines`.

    Args:
        path: The file.
        task: Index of the task that the examples belong to.
    """
    return [Example(query, answer, task) for query, answer in read_json_lines(path, EXAMPLE_KEYS)]


def read_preferences(path: str | os.PathLike[str]) -> list[Preference]:
    """Read lines such as `{"query": "...", "harmful": "sure ...", "safe": "no ..."}`; see `read_json_lines`."""
    return [Preference(*texts) for texts in read_json_lines(path, PREFERENCE_KEYS)]


def read_json_lines(path: str | os.PathLike[str], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Read the values of some keys from each line of a file. Empty lines and other keys are ignored.

    Args:
        path: A UTF-8 file, with or without a byte order mark.
        keys: Keys that every line must have, with a non-empty string as value.

    Returns:
        The values of each line, in the order of `keys`, unchanged.

    Raises:
        DataError: The file cannot be read, is empty, or has an invalid line. The message names the file and the line
            number.
    """
    file = expand(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    # Only line feeds end a line: JSON strings may contain other characters at which str.splitlines splits.
    lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    rows = [_texts(line, keys, f"{file}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{file}: expected a JSON object a line, got an empty file")
    return rows


def _texts(line: bytes, keys: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the values of one line; `where` is the file and the line number."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object in UTF-8 ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected a JSON object with {_listed(keys)}, got {type(entry).__name__}")
    for key in keys:
        if key not in entry:
            near = near_names(key, sorted(entry))
            advice = f"; is it {' or '.join(map(repr, near))}?" if near else ""
            raise DataError(
                f"{where}: expected the keys {_listed(keys)}, got {_listed(entry)}, without {key!r}{advice}"
            )
        _check_text(entry[key], f"{where}: {key}")
    return tuple(entry[key] for key in keys)


def _check_text(value: object, where: str) -> None:
    """Raise DataError unless a value is a non-empty string that can be encoded as UTF-8."""
    if not isinstance(value, str) or not value.strip():
        got = "an empty text" if isinstance(value, str) else f"{type(value).__name__} {value!r:.40}"
        raise DataError(f"{where}: expected a text that is not empty, got {got}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected text, got half of a surrogate pair ({error.reason})") from error


def _listed(keys: Sequence[str] | dict[str, object]) -> str:
    return ", ".join(map(repr, keys)) or "none"
