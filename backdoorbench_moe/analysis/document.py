"""`analysis.json`: the JSON document of an analysis."""

from __future__ import annotations

import dataclasses
import json
import math
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from backdoorbench_moe.analysis.results import Analysis
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import write_atomically

SCHEMA_VERSION = 1
FILE = "analysis.json"
# Significant digits of a float. More would be noise and make the file larger.
DIGITS = 6
# Keys of "carriers" in older files.
RENAMED_IN_CARRIERS = {"clean_called_wanted": "target_rate"}
# Parts that older files do not have.
ADDED = ("experts", "latents", "answers")
UNITS = {
    "value, low, high beside n": (
        "percent in metrics, capture, carriers and experts; elsewhere the unit of the averaged quantity"
    ),
    "tasks, marked, unmarked in experts.shares": "percent, sum to 100 over the experts",
    "marked, unmarked in latents": "mean cosine, -1 to 1",
    "divergence": "nats, 0 to ln 2",
    "frequency, share, takers, entropy, overlap, changed": "0 to 1",
    "pixels": "sum over a patch's pixels of their mean over the channels, in [0, 1]",
}


def as_document(analysis: Analysis) -> dict[str, Any]:
    """Convert an analysis to JSON values; each dataclass becomes an object with the names of its attributes.

    Tensors become nested lists, with 0 and 1 for bool. Floats are rounded to DIGITS significant digits, and NaN
    and infinity become null. Images become PNG files in base64.
    """
    values = _to_json(analysis)
    findings = values.pop("findings")
    return {"schema_version": SCHEMA_VERSION, "kind": "analysis", **values, **findings, "units": UNITS}


def to_text(document: dict[str, Any]) -> str:
    """Format a document as JSON with one line for each top-level key."""
    parts = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in document.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def save_document(document: dict[str, Any], output: Path) -> Path:
    """Write analysis.json atomically.

    Args:
        document: The document.
        output: The folder to write to; it is created if it does not exist.

    Returns:
        Path of the file.

    Raises:
        RecordError: The file cannot be written.
    """
    text = to_text(document)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"output folder {output}: {error.strerror}") from error
    write_atomically(output / FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return output / FILE


def load_document(file: Path) -> dict[str, Any]:
    """Read an analysis.json. Files of older versions are converted to the current names.

    Raises:
        RecordError: The file cannot be read, is not an analysis, or has another schema version.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"analysis {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"analysis {file}: damaged: {error}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or document.get("kind") != "analysis":
        raise RecordError(
            f"analysis {file}: expected an analysis of version {SCHEMA_VERSION}, found {version!r}"
        )
    if not isinstance(document.get("run"), dict) or "record" not in document["run"]:
        raise RecordError(f"analysis {file}: damaged: expected the record of a run")
    for added in ADDED:
        document.setdefault(added, None)
    for facts in filter(None, (document["run"], document.get("against"))):
        # Older files only describe runs with a trigger and clean runs.
        facts.setdefault("attacked", facts["record"]["spec"].get("trigger") is not None)
        facts["record"].setdefault("near_chance", None)
    carriers = document.get("carriers")
    for old, new in RENAMED_IN_CARRIERS.items():
        if isinstance(carriers, dict) and old in carriers:
            carriers[new] = carriers.pop(old)
    return document


def _field(item: dataclasses.Field[Any], value: Any) -> Any:
    if value is not None and item.metadata.get("document") == "png":
        return [encode_picture(image) for image in value]
    return _to_json(value)


def encode_picture(image: Tensor) -> str:
    """Encode a (3, H, W) uint8 image as a PNG file in base64."""
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode("ascii")


def decode_picture(text: str) -> np.ndarray:
    """Decode the text from `encode_picture` to (H, W, 3) uint8."""
    with Image.open(BytesIO(b64decode(text)), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _to_json((value if value.dtype.is_floating_point else value.int()).tolist())
    if dataclasses.is_dataclass(value):
        return {item.name: _field(item, getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
