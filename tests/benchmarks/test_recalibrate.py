"""The script that renews BN statistics: what it measures of a run is what the run's record says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny import tiny_spec

from backdoorbench_moe.engine.build import build_dataset
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recalibrate.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("recalibrate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
