"""Records for sharing, without the paths of the machine on which they were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backdoorbench_moe.config import DATASET_NOT_IN_DIGEST
from backdoorbench_moe.records.record import Record


def without_folders(record: Record) -> dict[str, Any]:
    """Return a record as plain values without paths of this machine.

    The options for the location of the data are removed. The path of a file that an option names is replaced by the
    file's name, wherever it occurs in the record. The digest of the spec is unchanged, since it covers the content of
    these files, not their paths.

    Args:
        record: The record.

    Returns:
        The values, which `records.parse_record` can read.
    """
    # The file of a defended run is a copy of its parent's file under another name.
    known = {file["key"]: file["name"] for file in record.files}
    paths = record.run_spec.file_paths
    names = {path: known.get(key, Path(path).name) for key, path in paths.items()}
    values: dict[str, Any] = _rename(record.to_dict(), names)
    dataset = values["spec"]["dataset"]
    values["spec"]["dataset"] = {k: v for k, v in dataset.items() if k not in DATASET_NOT_IN_DIGEST}
    return values


def _rename(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _rename(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_rename(item, names) for item in value]
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name)
    return value
