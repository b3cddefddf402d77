"""Measuring a run's model again: which differences from its record are allowed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from backdoorbench_moe.engine.measuring.consistency import check_same
from backdoorbench_moe.errors import RecordError

ENVIRONMENT = {
    "device": "cpu",
    "precision": "fp32",
    "threads": 2,
    "cpu": "some CPU",
    "packages": {"torch": "2.14.1"},
}


def run_with(environment, ba: float = 50.0, n: int = 1000):
    record = SimpleNamespace(metrics={"ba": {"value": ba, "n": n}}, judgements=[], environment=environment)
    return SimpleNamespace(record=record, folder=SimpleNamespace(path="runs/a"))


def measured(ba: float, n: int = 1000):
    return {"ba": {"value": ba, "n": n}}


def test_on_the_same_cpu_every_image_counts() -> None:
    run = run_with(ENVIRONMENT)
    check_same(run, measured(50.0), precision="fp32", environment=ENVIRONMENT)
    with pytest.raises(
        RecordError, match=r"BA in its record is 50\.00% of 1000 images, but now it is 50\.10% of 1000"
    ):
        check_same(run, measured(50.1), precision="fp32", environment=ENVIRONMENT)


@pytest.mark.parametrize(
    "changed",
    [{"threads": 1}, {"cpu": "another"}, {"packages": {"torch": "2.13.0"}}, {"device": "some GPU"}, None],
    ids=str,
)
def test_elsewhere_one_point_is_allowed(changed) -> None:
    run = run_with(ENVIRONMENT)
    here = None if changed is None else ENVIRONMENT | changed
    check_same(run, measured(50.9), precision="fp32", environment=here)
    with pytest.raises(RecordError, match="plug-in code or the model has changed"):
        check_same(run, measured(51.1), precision="fp32", environment=here)


def test_the_attack_success_rate_is_compared_as_well_and_other_metrics_are_not() -> None:
    run = run_with(ENVIRONMENT)
    run.record.metrics |= {"asr": {"value": 90.0, "n": 900}, "ra": {"value": 5.0, "n": 900}}
    now = {**measured(50.0), "ra": {"value": 9.0, "n": 900}}
    check_same(run, now, precision="fp32", environment=ENVIRONMENT)
    check_same(run, {**now, "asr": {"value": 90.0, "n": 900}}, precision="fp32", environment=ENVIRONMENT)
    with pytest.raises(
        RecordError, match=r"ASR in its record is 90\.00% of 900 images, but now it is 88\.90%"
    ):
        check_same(run, {**now, "asr": {"value": 88.9, "n": 900}}, precision="fp32")


def test_the_same_gpu_may_round_differently() -> None:
    gpu = ENVIRONMENT | {"device": "some GPU"}
    check_same(run_with(gpu), measured(50.9), precision="fp32", environment=copy.deepcopy(gpu))


def test_of_few_images_three_may_differ() -> None:
    run = run_with(ENVIRONMENT, n=60)
    check_same(run, measured(55.0, n=60), precision="fp32")
    with pytest.raises(RecordError):
        check_same(run, measured(56.7, n=60), precision="fp32")


def test_other_images_are_refused_and_another_precision_is_not_compared() -> None:
    run = run_with(ENVIRONMENT)
    with pytest.raises(RecordError, match="of 999"):
        check_same(run, measured(50.0, n=999), precision="fp32")
    check_same(run, measured(10.0), precision="bf16", environment=ENVIRONMENT)
