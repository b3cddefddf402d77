"""Files of JSON that nest without end, as a hostile or damaged file may: damage, and never a RecursionError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backdoorbench_moe.analysis.document import load_document
from backdoorbench_moe.auditing.store import read_values
from backdoorbench_moe.bench.running.life_sign import LIFE_SIGN, read_life_sign
from backdoorbench_moe.bench.tables.results import MANIFEST, RECORDS, read_lines, read_manifest
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import RunFolder

DEEP = "[" * 100_000
REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "analysis": ("analysis.json", lambda folder: load_document(folder / "analysis.json")),
    "manifest": (MANIFEST, read_manifest),
    "records": (RECORDS, read_lines),
    "record": ("record.json", lambda folder: RunFolder(folder).read()),
}
IGNORED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "life sign": (LIFE_SIGN, read_life_sign),
    "check of an audit": ("check.json", lambda folder: read_values(folder / "check.json")),
}


@pytest.mark.parametrize(("name", "read"), REFUSED.values(), ids=REFUSED.keys())
def test_a_file_that_is_needed_is_damaged(tmp_path, name, read) -> None:
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(RecordError, match="damaged"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "read"), IGNORED.values(), ids=IGNORED.keys())
def test_a_file_that_can_be_made_again_counts_as_missing(tmp_path, name, read) -> None:
    (tmp_path / name).write_text(DEEP)
    assert read(tmp_path) is None


def test_a_checkpoint_is_damaged(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint({"a": torch.zeros(1)}, {"epoch": 1})
    file = tmp_path / "checkpoint" / "state.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"state": DEEP})
    with pytest.raises(RecordError, match="damaged; delete it"):
        folder.load_checkpoint()
