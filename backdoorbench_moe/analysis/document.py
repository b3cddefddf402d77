"""`analysis.json`: an analysis as plain lists and numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from backdoorbench_moe.analysis.analyze import Analysis
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import write_atomically

SCHEMA_VERSION = 1
FILE = "analysis.json"
# More would be noise, and every number stands in the file.
DIGITS = 6
UNITS = {
    "value, low, high beside n": "percent in metrics, capture and carriers; otherwise the unit of what they are of",
    "divergence": "nats, 0 to ln 2",
    "frequency, share, takers, entropy, overlap, changed": "0 to 1",
    "pixels": "sum over a patch's pixels of their mean over the channels, in [0, 1]",
}


def as_document(analysis: Analysis) -> dict[str, Any]:
    """The analysis as JSON values: the fields of the dataclasses by their names.

    A bool is 0 or 1 in an array, a number that is not finite is null. Pixels of the examples are left out.
    """
    values = _plain(analysis)
    findings = values.pop("findings")
    return {"schema_version": SCHEMA_VERSION, "kind": "analysis", **values, **findings, "units": UNITS}


def to_text(document: dict[str, Any]) -> str:
    """A JSON document, one part a line."""
    parts = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in document.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def save_document(analysis: Analysis, output: Path) -> Path:
    """Write analysis.json into a folder, made if need be; whole or not at all. Raises RecordError."""
    text = to_text(as_document(analysis))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"output folder {output}: {error.strerror}") from error
    write_atomically(output / FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return output / FILE


def check_output(output: Path) -> None:
    """Raise RecordError if `output` can be no folder that takes a file; nothing is made."""
    place = output
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise RecordError(f"output folder {output}: expected a folder, {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RecordError(f"output folder {output}: {place} cannot be written to")
    if (output / FILE).is_dir():
        raise RecordError(f"output folder {output}: expected a file {FILE}, found a folder")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain((value.int() if value.dtype.is_floating_point is False else value).tolist())
    if dataclasses.is_dataclass(value):
        return {
            item.name: _plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if item.metadata.get("document", True)
        }
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
