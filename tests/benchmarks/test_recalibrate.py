"""The script that renews BN statistics: what it measures of a run is what the run's record says."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_spec

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.build import build_dataset
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.ops.image_rows import FileRows
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.ops.stored_images import StoredImages

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recalibrate.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("recalibrate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stored", [False, True])
def test_the_statistics_are_those_of_the_stamped_images(script, tmp_path, monkeypatch, stored) -> None:
    """Also of images that are read from a file, of which only the stamped ones are in memory."""
    [run] = run_attack(tiny_spec(train={"epochs": 1}, poison={"rate": 0.5}), output=tmp_path, twin=False)
    images = build_dataset(run.spec).load()
    plain = images.train.images.clone()
    if stored:
        file = tmp_path / "images"
        file.write_bytes(plain.numpy().tobytes())
        rows = FileRows(os.open(file, os.O_RDONLY), str(file), len(plain), (3, 32, 32))
        images = replace(images, train=Split(StoredImages([rows]), images.train.labels))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(script, "renew_statistics", lambda model, batches, precision: seen.extend(batches))
    script.renew(run, run.model(), images, len(plain))
    order = torch.randperm(len(plain), generator=generator(run.spec.seed, "recalibrate"))
    changed = (torch.cat(seen) != plain[order]).flatten(1).any(1)
    assert 0 < int(changed.sum()) <= len(plain) // 2
    plan = run.attack()(images.train.labels, num_classes=3, seed=run.spec.seed)
    assert set(order[changed].tolist()) <= set(plan.indices.tolist())


@pytest.mark.slow
def test_runs_with_other_options_of_a_data_set_get_their_own_images(script, tmp_path, monkeypatch) -> None:
    for count in (64, 32):
        dataset = {"name": "tiny", "train_images": count}
        spec = tiny_spec(dataset=dataset, train={"epochs": 1}, poison={"rate": 0.5})
        run_attack(spec, output=tmp_path, twin=False)
    given: dict[int, int] = {}
    monkeypatch.setattr(
        script,
        "renew",
        lambda run, model, images, count: given.update(
            {run.spec.dataset.options["train_images"]: len(images.train)}
        ),
    )
    folders = [str(record.parent) for record in tmp_path.glob("*/record.json")]
    monkeypatch.setattr("sys.argv", ["recalibrate.py", *folders])
    script.main()
    assert given == {64: 64, 32: 32}


@pytest.mark.slow
def test_the_recorded_metrics_of_an_attacked_run_and_the_target_rate_of_a_clean_one(script, tmp_path) -> None:
    [run] = run_attack(tiny_spec(train={"epochs": 1}), output=tmp_path)
    images = build_dataset(run.spec).load()
    measured = script.measure_run(run, run.model(), images)
    assert measured == {name: run.record.metrics[name] for name in ("ba", "asr", "target_rate")}
    twin = load_run(tmp_path / run.record.clean_twin)
    model = twin.model()
    measured = script.measure_run(twin, model, images)
    assert measured.keys() == {"ba", "target_rate"} and measured["ba"] == twin.record.metrics["ba"]
    others = images.test.labels != 0
    called = predict(model, images.test.images, precision="fp32")[others]
    assert measured["target_rate"]["value"] == pytest.approx(100 * (called == 0).double().mean().item())
    assert measured["target_rate"]["n"] == int(others.sum())
