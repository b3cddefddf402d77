"""Files that a spec names are part of it: by their content, wherever they lie and whatever became of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_spec

from backdoorbench_moe.config import PartSpec, RunSpec, build_spec, spec_from_dict
from backdoorbench_moe.engine import files
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import run_attack, run_defense
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.options import FilePath, list_options

TUNING = PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1})


def draw(path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def blended(path: str) -> RunSpec:
    return tiny_spec(trigger={"name": "blend", "image": path})


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run with a picture, named by a relative path."""
    (tmp_path / "one").mkdir()
    draw(tmp_path / "one" / "p.png", 1)
    monkeypatch.chdir(tmp_path / "one")
    [run] = run_attack(blended("p.png"), output=tmp_path / "runs", twin=False)
    return run


def test_the_record_has_the_file_and_the_folder_a_copy(run, tmp_path) -> None:
    [entry] = json.loads((run.folder.path / "record.json").read_text())["files"]
    original = tmp_path / "one" / "p.png"
    assert (entry["key"], entry["name"], entry["bytes"]) == (
        "trigger.image",
        "p.png",
        original.stat().st_size,
    )
    assert entry["sha256"] == files.sha256_of(original) == run.spec.files["trigger.image"]
    assert (run.folder.path / entry["kept"]).read_bytes() == original.read_bytes()
    assert load_run(run.folder.path).record == run.record


def test_another_folder_or_content_is_another_run_and_the_same_content_the_same(
    run, tmp_path, monkeypatch
) -> None:
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    shutil.copy(tmp_path / "one" / "p.png", tmp_path / "two" / "same.png")
    assert pin_files(blended("same.png")).digest == run.record.digest
    draw(tmp_path / "two" / "p.png", 2)
    [other] = run_attack(blended("p.png"), output=tmp_path / "runs", twin=False)
    assert other.folder.path != run.folder.path
    images = torch.full((1, 3, 32, 32), 0.5)
    assert not torch.equal(other.stamper()(images), run.stamper()(images))


def test_a_run_is_opened_and_defended_with_its_copy_whatever_became_of_the_file(run, tmp_path) -> None:
    images = torch.full((1, 3, 32, 32), 0.5)
    before = run.stamper()(images)
    draw(tmp_path / "one" / "p.png", 2)
    assert torch.equal(load_run(run.folder.path).stamper()(images), before)
    (tmp_path / "one" / "p.png").unlink()
    moved = run.folder.path.rename(tmp_path / "moved")
    defended = run_defense(load_run(moved), TUNING, output=tmp_path / "out")
    assert defended.record.stages[0]["metrics"]["asr"] == run.record.metrics["asr"]
    assert torch.equal(defended.stamper()(images), before)


def test_a_changed_copy_is_refused(run) -> None:
    draw(run.folder.path / run.record.files[0]["kept"], 3)
    for open_it in (run.stamper, lambda: run_defense(run, TUNING)):
        with pytest.raises(
            RecordError, match=r"trigger\.image: .* has changed: expected a file with SHA-256"
        ):
            open_it()


def test_a_large_file_is_not_copied_but_checked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "KEPT_BYTES", 10)
    draw(tmp_path / "p.png", 1)
    [run] = run_attack(blended(str(tmp_path / "p.png")), output=tmp_path / "runs", twin=False)
    assert run.record.files[0]["kept"] is None and run.stamper()
    draw(tmp_path / "p.png", 2)
    with pytest.raises(RecordError, match=r"trigger\.image: .* has changed"):
        run.stamper()
    (tmp_path / "p.png").unlink()
    with pytest.raises(RecordError, match=r"trigger\.image: the file that the run used no longer exists"):
        run.stamper()


def test_a_defended_run_names_the_file_as_its_parent_does(run, tmp_path) -> None:
    defended = run_defense(run, TUNING, output=tmp_path / "out")
    [there], [here] = run.record.files, defended.record.files
    assert here == there and here["name"] == "p.png"


def test_a_word_that_an_option_has_is_no_file(tmp_path, monkeypatch) -> None:
    class Picky:
        def __init__(self, *, start: FilePath | Literal["copy"] | None = None) -> None:
            pass

    monkeypatch.chdir(tmp_path)
    (tmp_path / "copy").touch()
    option = list_options(Picky)["start"]
    assert option.names_file("copy.bin") and not option.names_file("copy")


def test_a_spec_that_names_no_file_is_as_it_was() -> None:
    spec = build_spec({"trigger": {"name": "blend", "ratio": 0.2}})
    assert pin_files(spec) is spec and "files" not in spec.to_dict()


def test_a_pinned_spec_survives_its_dict_and_its_path_is_not_in_the_digest(tmp_path) -> None:
    draw(tmp_path / "p.png", 1)
    spec = pin_files(build_spec({"trigger": {"name": "blend", "image": str(tmp_path / "p.png")}}))
    assert spec_from_dict(spec.to_dict()) == spec
    assert spec.with_options({"trigger.image": "elsewhere.png"}).digest == spec.digest
    assert spec.with_options({"trigger.ratio": 0.3}).digest != spec.digest


def test_an_older_run_with_a_path_keeps_its_digest() -> None:
    """Before files were hashed, the path stood in the digest."""
    spec = build_spec({"trigger": {"name": "blend", "image": "p.png"}})
    assert spec.digest != build_spec({"trigger": {"name": "blend", "image": "q.png"}}).digest


def test_the_clean_twin_does_not_have_the_files_of_the_attack(tmp_path) -> None:
    """The twin names no file, and attacks that differ only in their picture share it."""
    runs = []
    for seed in (1, 2):
        draw(tmp_path / f"{seed}.png", seed)
        runs += run_attack(blended(str(tmp_path / f"{seed}.png")), output=tmp_path / "runs")
    assert len({run.folder.path for run in runs}) == 2
    [twin] = set((tmp_path / "runs").iterdir()) - {run.folder.path for run in runs}
    assert load_run(twin).record.status == "finished" and not load_run(twin).record.files


def test_a_spec_keeps_the_hashes_of_files_it_names_only(tmp_path) -> None:
    draw(tmp_path / "p.png", 1)
    spec = pin_files(blended(str(tmp_path / "p.png")))
    assert set(spec.files) == {"trigger.image"}
    assert clean_twin(spec).files == {}


def test_an_older_run_without_hashes_can_be_defended(run) -> None:
    """Its record has the path in place of the hash, and its digest, too."""
    path = run.folder.path / "record.json"
    values = json.loads(path.read_text())
    spec = spec_from_dict({**values["spec"], "files": {}})
    values |= {"spec": spec.to_dict(), "digest": spec.digest, "files": []}
    path.write_text(json.dumps(values))
    old = load_run(run.folder.path)
    assert old.record.digest == spec.digest != run.record.digest
    defended = run_defense(old, TUNING)
    assert defended.record.stages[0]["metrics"]["asr"] == run.record.metrics["asr"]


def test_a_trained_model_does_not_need_the_file_it_started_from(tmp_path) -> None:
    model = PartSpec("vmoe", {"upcycle": "gone.safetensors"})
    spec = dataclasses.replace(blended("p.png"), model=model, files={"model.upcycle": "0" * 64})
    files.check_files(spec)
    with pytest.raises(RecordError, match=r"trigger\.image: the file .* no longer exists"):
        files.check_files(dataclasses.replace(spec, files={"trigger.image": "0" * 64}))


def test_a_run_on_a_relative_data_folder_can_be_used_from_any_folder(tmp_path, monkeypatch) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for seed in range(8):
                draw(tmp_path / "data" / split / label / f"{seed}.png", seed)
    monkeypatch.chdir(tmp_path)
    spec = tiny_spec(dataset={"name": "folder", "root": "data", "image_size": 32})
    [made] = run_attack(spec, output=tmp_path / "runs", twin=False)
    monkeypatch.chdir(tmp_path / "runs")
    assert run_defense(load_run(made.folder.path), TUNING).record.status == "finished"
    with pytest.raises(
        ConfigError, match=r"dataset\.root: folder needs the folder of the images \(--data-root DIR\)"
    ):
        run_attack(tiny_spec(dataset="folder"), output=tmp_path / "runs")
