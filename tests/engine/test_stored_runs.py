"""Runs on images that are read from a file, bit for bit as on the same images in memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from defense_tasks import defended_spec
from tiny import Tiny, tiny_spec
from tiny_mixture import mixture_spec
from tiny_runs import outcome

from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.base import Dataset, ImageSet, Split
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.runner import Runner
from backdoorbench_moe.ops.image_rows import FileRows
from backdoorbench_moe.ops.stored_images import StoredImages


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A function after whose call the tiny data set lies in files, and memory may hold a dozen of its images."""

    def store() -> list[Path]:
        load = Dataset.load
        files: list[Path] = []

        def stored(self: Dataset) -> ImageSet:
            images = load(self)
            splits = []
            for name, split in (("train", images.train), ("test", images.test)):
                files.append(path := tmp_path / f"{name}{len(files)}")
                path.write_bytes(split.images.numpy().tobytes())
                rows = FileRows(os.open(path, os.O_RDONLY), str(path), len(split), (3, 32, 32))
                splits.append(Split(StoredImages([rows]), split.labels))
            return replace(images, train=splits[0], test=splits[1])

        monkeypatch.setattr(Dataset, "load", stored)
        monkeypatch.setenv("BBMOE_MEMORY", "40KB")
        return files

    return store


def part(name: str, **options: object) -> PartSpec:
    return PartSpec(name, options)


SPECS: dict[str, RunSpec] = {
    "clean": clean_twin(tiny_spec()),
    "image": tiny_spec(),
    "groups": tiny_spec(
        applicator="patch", trigger="warp", poison={"rate": 0.25, "cover": 0.2, "noise": 0.1}, probe=20
    ),
    "augmented": tiny_spec(train={"epochs": 2, "batch_size": 32, "lr": 0.1, "augment": "crop-flip"}),
    "controlled": tiny_spec(attack="training-control", applicator="patch", poison={"rate": 0.25, "noise": 0}),
    "surrogate": tiny_spec(trigger={"name": "narcissus", "steps": 2, "surrogate": "same"}),
    "mixture": mixture_spec(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_runs_are_the_same(tmp_path, store, name) -> None:
    spec = SPECS[name]
    expected = Runner(spec, tmp_path / "memory").attack(spec, twin=False)
    files = store()
    contents = Tiny().load().train.images.read().numpy().tobytes()
    found = Runner(spec, tmp_path / "stored").attack(spec, twin=False)
    assert outcome(found) == outcome(expected)
    assert found.record.data["digest"] == expected.record.data["digest"]
    # Poisoned images lie beside the file, not in it.
    assert files[0].read_bytes() == contents


DEFENSES = {
    "fine-pruning": defended_spec(),
    "notebook": tiny_spec(
        defenses=[
            {
                "name": "fine-pruning",
                "ratio": 0.5,
                "epochs": 1,
                "finetune_data": "notebook",
                "clean_fraction": 0.5,
            }
        ]
    ),
    "training set": tiny_spec(defenses=[{"name": "spectral", "epochs": 1}]),
    "filter": tiny_spec(defenses=[{"name": "strip", "clean_fraction": 0.75}]),
    "classes": tiny_spec(defenses=[{"name": "neural-cleanse", "epochs": 1}]),
    "channels": tiny_spec(defenses=["bnp"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENSES)
def test_defenses_are_the_same(tmp_path, store, name) -> None:
    spec = DEFENSES[name]
    expected = Runner(spec, tmp_path / "memory").attack(spec, twin=False)
    store()
    assert outcome(Runner(spec, tmp_path / "stored").attack(spec, twin=False)) == outcome(expected)


@pytest.mark.slow
def test_an_analysis_is_the_same(tmp_path, store) -> None:
    run = Runner(SPECS["groups"], tmp_path / "runs").attack(SPECS["groups"], twin=False)
    expected = analyze_run(run)
    store()
    found = analyze_run(run)
    assert repr(replace(found, seconds=expected.seconds)) == repr(expected)
