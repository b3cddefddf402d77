"""The speed benchmarks that train nothing, or only once, run, and write what their readers expect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from speed_scripts import SPEED, call, measure

from backdoorbench_moe.api import make_spec
from backdoorbench_moe.engine.runner import run_attack


def test_every_script_is_a_program() -> None:
    """So that those whose `main` is called here do the same as the files."""
    scripts = [
        text for file in SPEED.glob("*.py") if "def main()" in (text := file.read_text(encoding="utf-8"))
    ]
    assert len(scripts) > 10
    assert all(text.endswith('\nif __name__ == "__main__":\n    main()\n') for text in scripts)


@pytest.mark.slow
def test_startup(scripts, measure_here) -> None:
    result = measure_here(scripts("startup"), "--repeats", "1")
    goals = {command: row["goal_seconds"] for command, row in result["commands"].items()}
    assert goals == {
        "python -c pass": None,
        "bbmoe --help": 0.3,
        "bbmoe list": 1.0,
        "bbmoe attack --trigger wrap": 1.0,
    }
    for row in result["commands"].values():
        assert row["seconds_runs"] == [row["seconds"]]
        assert row["cpu_seconds"] > 0
        assert row["goal_met"] == (row["goal_seconds"] and row["seconds"] <= row["goal_seconds"])


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "data", images=16)
    result = measure(tmp_path, "memory.py", "--data-root", str(tmp_path / "data"), "--train-images", "64")
    assert result["train_images"] == 64
    assert result["test_images"] == 16
    assert result["runs"] == 2  # The victim and its clean twin.
    assert result["spec"]["train"]["batch_size"] == 128
    assert result["spec"]["train"]["epochs"] == 1
    # Training holds what the import alone holds, and both are counted in bytes.
    assert 50e6 < result["import_peak_bytes"] < result["peak_bytes"]
    assert result["goal_met"] == (result["peak_bytes"] <= 2.5e9)
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.slow
def test_memory_without_data(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = call("memory.py", "--data-root", str(tmp_path / "nowhere"), "--json", str(file))
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "exit code 2" in done.stderr
    assert not file.exists()


@pytest.mark.slow
def test_poisoning(scripts, measure_here) -> None:
    result = measure_here(scripts("poisoning"), "--images", "20", "--threads", "1")
    assert result["images"] == 20
    triggers = ("blend", "square", "warp", "warp (truncate)")
    pairs = {f"{trigger}, {place}" for trigger in triggers for place in ("image", "patch")}
    assert pairs <= result["seconds"].keys()
    batched = 20 / result["seconds"]["warp, image"]
    assert result["warp_speedup_over_loop"] == pytest.approx(batched / result["loop_images_per_second"])


def test_count_below_one() -> None:
    done = call("threads.py", "--rounds", "0")
    assert done.returncode == 2
    assert "argument --rounds: expected at least 1, got 0" in done.stderr


def write_cifar10(folder: Path, *, images: int) -> None:
    """Random images in CIFAR-10's binary form, `images` in each of its six files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (images, 1 + 3 * 32 * 32), np.uint8)
        rows[:, 0] = np.arange(images) % 10
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


@pytest.mark.slow
def test_analysis(tmp_path: Path, scripts, measure_here) -> None:
    small = {"train_images": 64, "test_images": 40}
    model = {"name": "pmoe", "widen_factor": 1, "moe_channels": 8, "expert_channels": 4}
    spec = make_spec(dataset={"name": "signs", **small}, model=model, train={"epochs": 1}, trigger="square")
    [run] = run_attack(spec, output=tmp_path / "runs")
    result = measure_here(scripts("analysis"), str(run.folder.path), "--threads", "1")
    assert list(result["rows"]) == ["alone", "beside its clean twin"]
    for name, row in result["rows"].items():
        assert row["test_images"] == 40 and 30 <= row["triggered_images"] < 40
        assert ("routing against" in row["parts"]) == (name != "alone")
        assert sum(row["parts"].values()) <= row["seconds"]
    parts = result["rows"]["alone"]["parts"]
    assert result["routing_seconds"] == parts["routing"] + parts["statistics"]
    assert not (run.folder.path / "analysis.json").exists()


@pytest.mark.slow
def test_larger_images(scripts, measure_here) -> None:
    [row] = measure_here(scripts("larger_images"), "--sides", "32")["rows"]
    assert (row["side"], row["patch"]) == (32, 4)
    assert all(row[name] > 0 for name in ("square", "blend", "warp", "train", "multiply_adds"))
    assert 0 < row["idle_bytes"] <= row["stamp_bytes"] <= row["train_bytes"]


@pytest.mark.slow
def test_allocator(scripts, measure_here) -> None:
    options = ("--work", "train 32x32", "--rounds", "1", "--steps", "2")
    rows = measure_here(scripts("allocator"), *options)["rows"]
    assert [row["work"] for row in rows] == ["train 32x32"]
    for row in rows:
        assert row["ratios"] == [row["ratio"]]
        assert row["kept"]["page_faults"] < row["as_it_is"]["page_faults"]
        assert 0 <= row["kept"]["system_seconds"] <= row["kept"]["cpu_seconds"]


def test_overhead(tmp_path: Path, scripts, measure_here) -> None:
    def record(train: float, total: float, **spec: object) -> str:
        return json.dumps({"spec": spec, "timing": {"train_seconds": train, "total_seconds": total}})

    folder = tmp_path / "suite" / "quick"
    folder.mkdir(parents=True)
    # The defended run and the one that was continued, whose last part is shorter than its training, do not count.
    lines = [record(10, 11), record(30, 33), record(1, 50, defenses=[{"name": "strip"}]), record(9, 4)]
    (folder / "records.jsonl").write_text("\n".join([*lines, json.dumps({"spec": {}, "timing": {}})]))
    result = measure_here(scripts("overhead"), str(folder))
    assert result["suites"] == {"suite/quick": {"runs": 2, "training": 40, "total": 44, "ratio": 1.1}}
    refused = call("overhead.py", str(tmp_path))
    assert refused.returncode == 2 and "expected a folder with records.jsonl" in refused.stderr
