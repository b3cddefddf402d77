"""Data that changed under the same name: noticed by their fingerprint and content, and not read without need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import Tiny, tiny_spec
from tiny_runs import Counting, outcome

from backdoorbench_moe.data import registry
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import RecordError


class Placed(Tiny):
    """Other images at every root, and of every `shift`."""

    file: Path | None = None
    shift = 0
    reads = 0

    def __init__(self, *, root: str, train_images: int | None = None) -> None:
        super().__init__(salt=int(root), train_images=train_images)
        self.root = root

    def source(self) -> Path | None:
        """A file, if there is one."""
        return self.file

    def read(self) -> ImageSet:
        """Draw the images, and count how often."""
        Placed.reads += 1
        self.salt += self.shift
        return super().read()


def test_other_data_under_the_same_name_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_attack(tiny_spec(), output=tmp_path, twin=False, observer=Counting(stop_after=1))
    monkeypatch.setattr(Tiny, "offset", 1)
    with pytest.raises(RecordError, match="was made from other data"):
        run_attack(tiny_spec(), output=tmp_path, twin=False)


def test_a_finished_run_of_other_data_is_not_taken_for_this_one(tmp_path, monkeypatch) -> None:
    """A spec's digest leaves out where the data lies: the record's content digest decides."""
    monkeypatch.setitem(registry._local, "placed", Placed)
    specs = [
        tiny_spec(dataset={"name": "placed", "root": root, "train_images": 32}) for root in ("1", "2", "01")
    ]
    [first] = run_attack(specs[0], output=tmp_path, twin=False)
    assert {spec.name for spec in specs} == {first.spec.name}
    with pytest.raises(RecordError, match="was made from other data"):
        run_attack(specs[1], output=tmp_path, twin=False)
    again = Counting()
    [moved] = run_attack(specs[2], output=tmp_path, twin=False, observer=again)
    assert again.epochs == 0 and outcome(moved) == outcome(first)


def test_data_whose_files_have_not_changed_are_not_read_again(tmp_path, monkeypatch) -> None:
    """The fingerprint decides: of another one, the content; without one, the content, too."""
    monkeypatch.setitem(registry._local, "placed", Placed)
    file = tmp_path / "images.bin"
    file.write_bytes(b"abc")
    monkeypatch.setattr(Placed, "file", file)
    spec = tiny_spec(dataset={"name": "placed", "root": "1", "train_images": 32})
    [first] = run_attack(spec, output=tmp_path, twin=False)
    assert first.record.data["fingerprint"]
    monkeypatch.setattr(Placed, "reads", 0)
    assert run_attack(spec, output=tmp_path, twin=False)[0].record == first.record and Placed.reads == 0
    os.utime(file, ns=(0, 0))
    assert run_attack(spec, output=tmp_path, twin=False)[0].record == first.record and Placed.reads == 1
    file.write_bytes(b"abcd")
    monkeypatch.setattr(Placed, "shift", 5)
    with pytest.raises(RecordError, match="was made from other data"):
        run_attack(spec, output=tmp_path, twin=False)
    first.record.data["fingerprint"] = None
    first.folder.write(first.record)
    with pytest.raises(RecordError, match="was made from other data"):
        run_attack(spec, output=tmp_path, twin=False)
