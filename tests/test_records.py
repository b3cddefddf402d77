"""The run folder: atomic, checked, held by one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_weights import safetensors
from safetensors import safe_open

from backdoorbench_moe.config import build_spec
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import Judged, Record, RunFolder, write_atomically
from backdoorbench_moe.records.locking import hold_place


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write(Record.for_spec(build_spec({})))
    return folder


def test_record_survives_the_disk(folder) -> None:
    record = folder.read()
    record.metrics = {"ba": {"value": 90.0, "n": 100, "low": 82.6, "high": 94.5}}
    folder.write(record)
    assert folder.read() == record
    assert [path.name for path in folder.path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[]", "damaged: expected the key 'schema_version'"),
        (lambda text: text.replace('"schema_version": 4', '"schema_version": 9'), "version 1 to 4, found 9"),
        (lambda text: text.replace('"schema_version": 4', '"schema_version": 0'), "version 1 to 4, found 0"),
        (lambda text: text.replace('"schema_version": 4', '"schema_version": true'), "1 to 4, found True"),
        (lambda text: text.replace('"schema_version": 4', '"schema_version": 1'), "schema version 1 does not have"),
        (lambda text: text.replace('"stages": []', '"stages": [3]'), r"'stages\[0\]': expected a mapping"),
        (lambda text: text.replace('"stages": []', '"stages": [{"name": "t"}]'), r"stages\[0\]': expected the key"),
        (lambda text: text.replace('"judgements": []', '"judgements": 3'), "'judgements': expected a list"),
        (lambda text: text.replace('"judgements": []', '"judgements": [{"about": 3}]'), "about': expected a string"),
        (lambda text: text.replace('"inputs": []', '"inputs": [{"role": "parent"}]'), "expected the key 'run'"),
        (lambda text: text.replace('"clean_twin": null', '"clean_twin": 3'), "'clean_twin': expected a string"),
        (lambda text: text.replace('"status"', '"state"'), r"missing \['status'\], unknown \['state'\]"),
        (lambda text: text.replace('"metrics": {}', '"metrics": 3'), "'metrics': expected a mapping, found 3"),
        (lambda text: text.replace('"metrics": {}', '"metrics": {"ba": 90}'), "'metrics.ba': expected a mapping"),
        (lambda text: text.replace('"metrics": {}', '"metrics": {"ba": {"value": 9}}'), "ba': expected value, n"),
        (lambda text: text.replace('"history": []', '"history": [{"epoch": 1}]'), r"'history\[0\]': expected the keys"),
        (lambda text: text.replace('"timing": {}', '"timing": {"a": "b"}'), "'timing.a': expected a number, found 'b'"),
        (lambda text: text.replace('"parts": {}', '"parts": null'), "'parts': expected a mapping, found None"),
        (lambda text: text.replace('"data": {}', '"data": {"digest": 3}'), "'data': expected the key 'classes'"),
        (lambda text: text.replace('"environment": {}', '"environment": {"a": 3}'), "expected the key 'packages'"),
        (lambda text: text.replace('"poison": null', '"poison": 3'), "'poison': expected a mapping, found 3"),
        (lambda text: text.replace('"error": null', '"error": 3'), "'error': expected a string, found 3"),
        (lambda text: text.replace('"running"', '"finished"'), "'data': expected the key 'classes'"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "the digest of its spec"),
        (lambda text: text.replace('"seed": 0', '"seed": "x"'), "seed: expected an integer"),
        (lambda text: text.replace('"seed"', '"sead"'), "unknown 'sead'"),
        (lambda text: text.replace('"parts": {}', f'"parts": {{"a": {"[" * 900}{"]" * 900}}}'), "nested deeper than"),
        (lambda text: text.replace('"signs"', f'"signs", "a": {"[" * 900}{"]" * 900}'), "nested deeper than 100"),
    ],
)  # fmt: skip
def test_damaged_records_are_refused_by_file_and_reason(folder, change, message) -> None:
    file = folder.path / "record.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(RecordError, match=message) as error:
        folder.read()
    assert str(file) in str(error.value)


def test_a_damaged_compressed_file_is_named(folder) -> None:
    folder.save_poison({"indices": np.arange(1000)})
    [file] = folder.path.glob("poison.npz")
    content = bytearray(file.read_bytes())
    for at in range(60, len(content) - 200, 7):  # Behind the header of the file within.
        content[at] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(RecordError, match=f"{file}: missing or damaged"):
        folder.load_poison()


@pytest.mark.parametrize(
    ("offset", "byte"),
    [
        (8, 99),  # The compression method.
        (6, 1),  # The flag for encryption.
        (6, 1 << 5),  # The flag for patched data.
        (4, 255),  # The version of the format.
    ],
)
def test_a_compressed_file_of_an_unsupported_kind_is_damaged(folder, offset, byte) -> None:
    """Offsets in a member's entry in the central directory of a zip file, two bytes before those in its own header."""
    folder.save_poison({"indices": np.arange(5)})
    file = folder.path / "poison.npz"
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 2 + offset] = byte
    file.write_bytes(content)
    with pytest.raises(RecordError, match=f"{file}: missing or damaged"):
        folder.load_poison()


def test_an_array_that_announces_more_than_memory_is_damaged(folder) -> None:
    with (
        zipfile.ZipFile(folder.path / "poison.npz", "w") as archive,
        archive.open("indices.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)}
        )
    with pytest.raises(RecordError, match="missing or damaged"):
        folder.load_poison()


def test_an_array_instead_of_a_compressed_file_is_damaged(folder) -> None:
    with (folder.path / "poison.npz").open("wb") as file:
        np.save(file, np.arange(5))
    with pytest.raises(RecordError, match="missing or damaged"):
        folder.load_poison()


@pytest.mark.parametrize("indices", [np.array([0.5]), np.array(["a"]), np.zeros((2, 2), np.int64)])
def test_poison_indices_of_another_kind_are_refused(tmp_path, indices) -> None:
    folder = RunFolder(tmp_path)
    np.savez(tmp_path / "poison.npz", indices=indices)
    with pytest.raises(RecordError, match="damaged: expected int64 indices"):
        folder.load_poison()


def test_what_is_no_run_folder_is_said_to_be_none(tmp_path) -> None:
    with pytest.raises(RecordError, match=r"expected a folder with a record\.json"):
        RunFolder(tmp_path / "none").read()
    with pytest.raises(RecordError, match=r"expected a record\.json in it"):
        RunFolder(tmp_path).read()


def test_tensors_and_header_survive(folder) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    folder.save_model(tensors, {"backdoored": "true"})
    loaded, header = folder.load_tensors()
    assert header == {"backdoored": "true"}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_tensor_with_two_names_is_written_under_both(folder) -> None:
    tied = torch.arange(6.0)
    folder.save_model({"embedding": tied, "head": tied, "rest": tied[2:]}, {})
    found, _ = folder.load_tensors()
    assert torch.equal(found["embedding"], tied) and torch.equal(found["head"], tied)
    assert torch.equal(found["rest"], tied[2:])


def test_equal_models_are_equal_files(folder) -> None:
    """The library writes the metadata in random order."""
    tensors = {"a": torch.rand(3, 5), "b": torch.rand(2)}
    header = {f"key {number}": "é" * number for number in range(12)}
    found = set()
    for names in (list(header), list(reversed(header))):
        folder.save_model(tensors, {name: header[name] for name in names})
        found.add((folder.path / "model.safetensors").read_bytes())
    assert len(found) == 1
    loaded, again = folder.load_tensors()
    assert again == header and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


# The size is larger than any that torch takes; the file itself is sound.
HUGE = safetensors({"a": {"dtype": "F32", "shape": [0, (1 << 64) - 1], "data_offsets": [0, 0]}})


@pytest.mark.parametrize("content", [b"", b"junk that is no model", b"\x80\x04\x95.", HUGE])
def test_model_files_are_safetensors_only(folder, content) -> None:
    with pytest.raises(RecordError, match="not found"):
        folder.load_tensors()
    (folder.path / "model.safetensors").write_bytes(content)
    with pytest.raises(RecordError, match="expected a safetensors file") as caught:
        folder.load_tensors()
    assert "\n" not in str(caught.value)


def test_poison_indices(folder) -> None:
    folder.save_poison({"indices": np.array([3, 5, 8])})
    assert folder.load_poison().tolist() == [3, 5, 8]
    np.savez(folder.path / "poison.npz", indices=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(RecordError, match="missing or damaged"):
        folder.load_poison()


def test_checkpoint(folder) -> None:
    assert folder.load_checkpoint() is None
    for epoch in (1, 2):
        folder.save_checkpoint({"w": torch.full((2,), float(epoch))}, {"epoch": epoch})
    tensors, state = folder.load_checkpoint()
    assert (tensors["w"].tolist(), state) == ([2.0, 2.0], {"epoch": 2})
    file = folder.path / "checkpoint" / "state.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["state"]) == {"epoch": 2}
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RecordError, match=r"checkpoint .*: damaged; delete it to train from the start"):
        folder.load_checkpoint()
    folder.drop_checkpoint()
    assert folder.load_checkpoint() is None


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def put(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RecordError, match="cannot be written: No space left on device"):
        write_atomically(target, put)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_full_disk_is_one_clear_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(RecordError, match="No space left"):
        write_atomically(Path("/dev/shm/bbmoe-test-file"), lambda path: full.write_bytes(b"x" * 10))


def test_an_output_that_is_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RecordError, match="output folder"), RunFolder(tmp_path / "runs" / "run").lock():
        pass


HOLD = """
import sys, time
from backdoorbench_moe.records import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_lets_go(folder) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RecordError, match=rf"another process \(pid {holder.pid}\)"), folder.lock():
        pass
    told = []

    def wait() -> None:
        told.append(True)
        holder.kill()

    with folder.lock(wait=wait):
        assert told
        assert (folder.path / ".lock").read_text() == f"pid {os.getpid()}"
    holder.wait()
    holder.stdout.close()


@pytest.mark.parametrize("call", ["os.open", "fcntl.flock"])
def test_a_place_that_cannot_be_held_is_used_without_a_lock(call, tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(f"backdoorbench_moe.records.locking.{call}", refuse)
    with hold_place(tmp_path / "results"):
        held = True
    assert held and not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(RecordError, match="File name too long"):
        assert not RunFolder(tmp_path / ("a" * 300)).exists


def test_the_record_is_json_for_any_reader(folder) -> None:
    """No NaN, no infinity: other readers than Python's refuse them."""
    record = folder.read()
    record.timing["a"] = float("inf")
    record.judgements = [
        Judged(
            about="expert",
            scores={"moe/0": float("nan"), "moe/1": 1.0},
            threshold=None,
            suspicious=[],
            reason="r",
            details={"list": [float("-inf")]},
        )
    ]
    record.timing.pop("a")
    folder.write(record)
    text = (folder.path / "record.json").read_text()
    assert not {"NaN", "Infinity"} & set(text.replace(",", " ").split())
    [judged] = folder.read().judgements
    assert judged["scores"] == {"moe/0": None, "moe/1": 1.0} and judged["details"] == {"list": [None]}


def test_groups_of_poisoned_images(folder) -> None:
    groups = {"indices": np.array([3, 5]), "cover": np.array([1]), "noise": np.array([], np.int64)}
    folder.save_poison(groups)
    assert [folder.load_poison(name).tolist() for name in groups] == [[3, 5], [1], []]
    folder.save_poison({"indices": np.array([3, 5])})
    assert folder.load_poison("cover").tolist() == [], "as runs from before there were groups"


SAVING = """
import resource, sys, torch
from pathlib import Path
from backdoorbench_moe.records import RunFolder
folder = RunFolder(sys.argv[1])
folder.save_model({"small": torch.ones(10)}, {"a": "b"})
tensors = {f"t{n}": torch.ones(10 << 20) for n in range(5)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder.save_model(tensors, {"a": "b"})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
def test_saving_takes_no_copy_in_memory(folder) -> None:
    """Of 200 MiB; the largest memory is in KiB."""
    found = subprocess.run(
        [sys.executable, "-c", SAVING, str(folder.path)], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 50 << 10
