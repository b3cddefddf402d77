"""What is passed on to others does not say in which folders of this machine anything lies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from making import run as run_suite
from PIL import Image
from tiny import TINY_MODEL, tiny_spec

from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.analysis.save import save_analysis
from backdoorbench_moe.bench.save import save_results
from backdoorbench_moe.bench.suites.reading import parse_suite
from backdoorbench_moe.bench.suites.suite import value_of
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack, run_defense
from backdoorbench_moe.records import Record, parse_record
from backdoorbench_moe.records.sharing import without_folders

TUNING = {"name": "fine-tuning", "clean_fraction": 0.5, "epochs": 1}


def draw(file: Path, colour: tuple[int, int, int], seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (32, 32, 3))
    Image.fromarray((np.array(colour) // 2 + noise).astype(np.uint8)).save(file)


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder with a data set and a picture, whose name is in no other text."""
    home = tmp_path / "somewhere-of-mine"
    for split, count in (("train", 20), ("test", 8)):
        for number, name in enumerate(("red", "green", "blue")):
            colour = tuple(255 * (place == number) for place in range(3))
            for seed in range(count):
                draw(home / "data" / split / name / f"{seed}.png", colour, seed)
    draw(home / "picture.png", (250, 250, 0), 1)
    return home


def suite_in(home: Path):
    base = {
        "recipe": "paper",
        "dataset": {"name": "folder", "root": str(home / "data"), "image_size": 32},
        "model": TINY_MODEL,
        "precision": "fp32",
        "train": {"epochs": 1, "batch_size": 32},
    }
    trigger = {"name": "blend", "image": str(home / "picture.png")}
    grid = {
        "applicator": "image",
        "trigger": [trigger],
        "poison.rate": [0.25, 0.5],
        "defenses": [[], [TUNING]],
    }
    table = {"title": "Mine", "rows": ["dataset", "trigger", "defenses"], "columns": "poison.rate"}
    layout = {
        "tables": [{**table, "metrics": ["asr", "cad"]}],
        "plots": [{"title": "Mine", "panels": "defenses", "lines": "trigger"}],
    }
    return parse_suite({"title": "Mine", "version": 1, "base": base, "grid": grid, **layout}, "mine")


@pytest.mark.slow
def test_no_file_of_a_suite_or_an_analysis_says_where_anything_lies(home, tmp_path) -> None:
    suite, runs, out = suite_in(home), home / "runs", tmp_path / "out"
    report, _ = run_suite(suite, runs)
    assert report.is_complete
    results = ResultSet.from_runs(suite, runs)
    save_results(results, out / "suite")
    for cell in suite.cells[:2]:  # An attacked model, and the same defended.
        made = load_run(runs / cell.spec.name)
        analysis = analyze_run(made, images=[1, home / "picture.png"], carriers_images=10)
        save_analysis(analysis, out / cell.spec.name)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"records.jsonl", "tidy.csv", "analysis.json", "report.html"}
    for file in files:
        assert home.name.encode() not in file.read_bytes(), file
        assert home.name not in file.name
    # The name of the picture is there, and the records are whole.
    assert "image=picture.png" in (out / "suite" / "tidy.csv").read_text()
    assert len(ResultSet.from_folder(suite, out / "suite").finished()) == len(results.finished()) == 5


@pytest.mark.slow
def test_a_twin_that_cannot_be_used_is_named_without_its_folder(home) -> None:
    [run] = run_attack(tiny_spec(train={"epochs": 1}), output=home / "runs")
    (run.folder.path.parent / run.record.clean_twin / "record.json").write_text("{")
    analysis = analyze_run(run, carriers_images=10)
    [reason] = [one.reason for one in analysis.absent if one.part == "against"]
    assert "cannot be used" in reason and run.record.clean_twin in reason and str(home) not in reason


def test_a_shared_record_is_the_record_but_for_its_folders(home) -> None:
    spec = pin_files(tiny_spec(trigger={"name": "blend", "image": str(home / "picture.png")}))
    spec = spec.with_data(salt=1)
    record = Record.for_spec(spec)
    record.parts = {"trigger": {"image": str(home / "picture.png"), "ratio": 0.5}}
    record.error = f"blend: {home / 'picture.png'}: too small"
    before = record.to_dict()
    shared = without_folders(record)
    assert record.to_dict() == before
    text = json.dumps(before).replace(str(home / "picture.png"), "picture.png")
    assert shared == json.loads(text)
    assert parse_record(shared, home).digest == record.digest


def test_a_spec_without_folders_has_the_same_digest(home) -> None:
    data = {"name": "folder", "root": str(home / "data"), "image_size": 32}
    spec = tiny_spec(dataset=data, trigger={"name": "blend", "image": str(home / "picture.png")})
    spec = pin_files(spec)
    shared = spec.without_folders()
    assert shared.digest == spec.digest and home.name not in json.dumps(shared.to_dict())
    assert shared.dataset == PartSpec("folder", {"image_size": 32})
    assert shared.without_folders() == shared
    assert value_of(spec, "trigger") == "blend, image=picture.png"
    assert value_of(spec, "trigger.image") == "picture.png" and value_of(spec, "dataset.root") is None


@pytest.mark.slow
def test_the_lines_of_a_defended_run_can_be_read(home, tmp_path) -> None:
    """Its picture is the copy in the folder of the attacked run."""
    spec = tiny_spec(train={"epochs": 1}, trigger={"name": "blend", "image": str(home / "picture.png")})
    [parent] = run_attack(spec, output=home / "runs", twin=False)
    options = {key: value for key, value in TUNING.items() if key != "name"}
    defended = run_defense(parent, PartSpec("fine-tuning", options))
    assert str(home) in json.dumps(defended.record.to_dict())
    shared = without_folders(defended.record)
    assert str(home) not in json.dumps(shared)
    assert parse_record(shared, tmp_path).digest == defended.record.digest
