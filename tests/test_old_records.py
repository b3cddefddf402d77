"""Records of older versions, and the committed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backdoorbench_moe.config import build_spec
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import SCHEMA_VERSION, Record, RunFolder
from backdoorbench_moe.records.reading import ADDED_IN


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write(Record.for_spec(build_spec({})))
    return folder


COMMITTED = sorted((Path(__file__).parents[1] / "benchmarks" / "results").rglob("record.json"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_records_stay_readable_and_keep_their_digests(file) -> None:
    """Records of every version that was ever committed; their folders were named when they were made."""
    record = RunFolder(file.parent).read()
    assert record.schema_version == SCHEMA_VERSION
    assert record.run_spec.digest == json.loads(file.read_text())["digest"]
    assert record.run_spec.name.endswith(record.digest) and file.parent.name.endswith(record.digest)


LATER = {1: ("parent", "stages", "scores", "verdict"), 2: ()}
OLD = {"parent": "signs-pmoe-s0-0123456789", "stages": [], "scores": {}, "verdict": {}}


def old_record(folder, version: int, **changes) -> Path:
    """Write the folder's record as a version of the schema had it."""
    file = folder.path / "record.json"
    later = ADDED_IN[3] | ADDED_IN[4]
    values = {k: v for k, v in json.loads(file.read_text()).items() if k not in later}
    values = {k: v for k, v in {**OLD, **values, **changes}.items() if k not in LATER[version]}
    file.write_text(json.dumps({**values, "schema_version": version}))
    return file


def test_a_record_of_version_1_is_read_and_written_as_one_of_today(folder) -> None:
    today = json.loads((folder.path / "record.json").read_text())
    file = old_record(folder, 1)
    record = folder.read()
    assert (record.parent, record.stages, record.inputs, record.judgements) == (None, [], [], [])
    folder.write(record)
    assert json.loads(file.read_text()) == today


def test_a_record_of_version_3_has_no_tasks_and_no_shares(folder) -> None:
    file = folder.path / "record.json"
    today = json.loads(file.read_text())
    old = {k: v for k, v in today.items() if k not in ADDED_IN[4]}
    file.write_text(json.dumps({**old, "schema_version": 3}))
    record = folder.read()
    assert (record.tasks, record.gate_shares) == ([], [])
    folder.write(record)
    assert json.loads(file.read_text()) == today


def test_what_version_2_said_of_a_defense_is_kept(folder) -> None:
    scores = {"expert": {"moe/0": 1.5, "moe/1": 2.0}, "class": [0.5, 0.25]}
    verdict = {
        "expert": {"dropped": ["moe/1"], "accuracy": [90.0]},
        "sample": {"threshold": 0.5, "calibrated_on": 44},
        "model": True,
    }
    old_record(folder, 2, scores=scores, verdict=verdict)
    record = folder.read()
    assert record.parent == OLD["parent"]
    assert record.inputs == [{"role": "parent", "run": OLD["parent"], "digest": None, "sha256": None}]
    kept = {one["about"]: one for one in record.judgements}
    assert list(kept) == ["expert", "class", "input", "model"]
    assert (kept["expert"]["scores"], kept["expert"]["suspicious"]) == (scores["expert"], ["moe/1"])
    assert kept["expert"]["details"] == {"accuracy": [90.0]}
    assert kept["class"]["scores"] is None and kept["class"]["details"] == {"scores": [0.5, 0.25]}
    assert (kept["input"]["threshold"], kept["input"]["details"]) == (0.5, {"calibrated_on": 44})
    assert kept["model"]["details"] == {"verdict": True}
    folder.write(record)
    assert folder.read() == record


def test_what_version_2_said_in_another_form_is_kept_in_the_details(folder) -> None:
    scores = {"expert": {"moe": {"0": 1.5}}, "class": {"0": 1.0}}
    verdict = {"expert": {"masked": [3, 5]}, "class": {"reset": 4, "threshold": [0.1, 0.2]}}
    old_record(folder, 2, scores=scores, verdict=verdict)
    record = folder.read()
    expert, of_class = record.judgements
    assert (expert["scores"], expert["suspicious"]) == (None, ["3", "5"])
    assert expert["details"] == {"scores": {"moe": {"0": 1.5}}}
    assert (of_class["scores"], of_class["suspicious"], of_class["threshold"]) == ({"0": 1.0}, ["4"], None)
    assert of_class["details"] == {"threshold": [0.1, 0.2]}
    folder.write(record)
    assert folder.read() == record


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_record_lacks_nothing_else(folder, version) -> None:
    file = old_record(folder, version)
    values = json.loads(file.read_text())
    del values["timing"]
    file.write_text(json.dumps(values))
    with pytest.raises(RecordError, match=r"missing \['timing'\]"):
        folder.read()
