"""A defended run: made from its parent, measured by the engine, kept apart from the attacker."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from defense_tasks import CPU, PRUNING, TUNING, changed, defended_spec, outcome
from fake_runs import finished
from safetensors import safe_open
from tiny import TINY_MODEL, Tiny, count_hits, tiny_spec
from tiny_runs import Counting

from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.engine import twin
from backdoorbench_moe.engine.graph import PARENT, clean_twin, needs
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import Runner, run_attack, run_defense
from backdoorbench_moe.engine.twin import TWIN_METRICS, link_twin
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import Input, RunFolder


def test_the_parent_is_finished_first_and_the_folder_holds_all(tmp_path) -> None:
    spec = defended_spec()
    run = Runner(spec, tmp_path).attack(spec)
    parent = load_run(tmp_path / needs(spec)["parent"].name)
    record = json.loads((run.folder.path / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["inputs"] == [
        {
            "role": "parent",
            "run": parent.folder.path.name,
            "digest": parent.record.digest,
            "sha256": hashlib.sha256((parent.folder.path / "model.safetensors").read_bytes()).hexdigest(),
        }
    ]
    assert record["spec"]["defenses"] == [PRUNING] and "-fine-pruning-" in run.folder.path.name
    assert [stage["name"] for stage in record["stages"]] == ["before", "pruned", "tuned"]
    assert record["data"]["clean_images"] == 48 and record["parts"]["defense"]["ratio"] == 0.25
    assert len(record["history"]) == 1 and record["seeds"]["defense"]
    for stage in record["stages"]:
        for metric, count in (("ba", 60), ("asr", 40), ("ra", 40)):
            entry = stage["metrics"][metric]
            assert entry["n"] == count and 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 100
    before, last = record["stages"][0]["metrics"], record["stages"][-1]["metrics"]
    assert {name: before[name] for name in ("ba", "asr")} == {
        name: parent.record.metrics[name] for name in ("ba", "asr")
    }
    clean = load_run(tmp_path / record["clean_twin"])
    assert clean.spec == clean_twin(tiny_spec())
    cad = {"value": clean.value("ba") - last["ba"]["value"], "n": 60}
    twin = {name: record["metrics"][name] for name in ("twin_asr", "twin_target_rate")}
    assert all(metric["n"] == 40 for metric in twin.values())
    assert record["metrics"] == {**last, "cad": cad, **twin} and "cad" not in last
    names = sorted(path.name for path in run.folder.path.iterdir())
    assert names == [".lock", "model.safetensors", "poison.npz", "record.json"]
    assert (run.folder.load_poison() == parent.folder.load_poison()).all()
    with safe_open(run.folder.path / "model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert header["backdoored"] == "true" and header["defended_by"] == "fine-pruning"
    assert header["parent"] == parent.folder.path.name and header["digest"] == spec.digest


@pytest.mark.slow
def test_the_record_can_be_measured_again_from_the_folder_alone(tmp_path) -> None:
    spec = defended_spec(train={"epochs": 4, "batch_size": 8})
    run = Runner(spec, tmp_path).finish(spec)
    images, model = Tiny().load(), load_run(run.folder.path).model()
    assert run.value("ba") == 100 * count_hits(model, images.test) / 60
    triggered = triggered_test(images, run.attack(), run.stamper())
    predicted = predict(model, triggered.images, precision="fp32")
    assert run.value("asr") == 100 * (predicted == triggered.wanted).double().mean().item()
    assert run.value("ra") == pytest.approx(100 * (predicted == triggered.true).double().mean().item())
    assert run.value("asr") + run.value("ra") <= 100
    zero = (run.folder.load_tensors()[0]["moe.conv.weight"] == 0).flatten(1).all(1)
    assert zero.reshape(4, 4).sum(1).tolist() == [1, 1, 1, 1]


@pytest.mark.slow
def test_the_same_spec_gives_the_same_numbers_and_a_finished_run_is_only_read(tmp_path) -> None:
    spec = defended_spec()
    one = Runner(spec, tmp_path / "one").finish(spec)
    torch.manual_seed(99)
    two = Runner(spec, tmp_path / "two").finish(spec)
    assert outcome(one) == outcome(two)
    again = Counting()
    assert outcome(Runner(spec, tmp_path / "one", again).finish(spec)) == outcome(one)
    assert again.epochs == 0


@pytest.mark.slow
def test_a_defended_run_can_be_defended_again(tmp_path) -> None:
    [victim] = run_attack(tiny_spec(), output=tmp_path)
    once = run_defense(victim, PartSpec("fine-pruning", {k: v for k, v in PRUNING.items() if k != "name"}))
    twice = run_defense(once, PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1}))
    assert twice.record.parent == once.folder.path.name
    assert twice.spec.defenses == (
        *once.spec.defenses,
        PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1}),
    )
    assert twice.record.stages[0]["metrics"] == once.record.stages[-1]["metrics"]
    assert twice.record.clean_twin == victim.record.clean_twin and "cad" in twice.record.metrics
    whole = Runner(twice.spec, tmp_path / "whole").finish(defended_spec(PRUNING, TUNING))
    assert len(list((tmp_path / "whole").iterdir())) == 3
    assert outcome(whole)[1:] == outcome(twice)[1:]


@pytest.mark.slow
def test_a_defended_run_has_what_its_parents_record_says_of_the_twin(tmp_path, monkeypatch) -> None:
    """It is what measuring the twin again would give."""
    [victim] = run_attack(tiny_spec(), output=tmp_path)
    measure = twin._measure_twin
    monkeypatch.setattr(twin, "_measure_twin", lambda *_: 1 / 0)
    defended = run_defense(victim, PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1}))
    found = {name: defended.record.metrics[name] for name in TWIN_METRICS}
    clean = load_run(tmp_path / victim.record.clean_twin)
    assert found == measure(defended, clean, Runner(victim.spec, tmp_path).workplace)
    assert defended.record.metrics["cad"]["value"] == clean.value("ba") - defended.value("ba")
    assert load_run(defended.folder.path).record == defended.record


TWIN = {"twin_asr": {"value": 12.5, "n": 40}, "twin_target_rate": {"value": 7.5, "n": 40}}
MEASURED = {name: {"value": 99.0, "n": 40} for name in TWIN}


def put(output, spec, **values: object) -> Run:
    """A finished run that nobody made, with a model file."""
    record = replace(finished(spec), **values)
    folder = RunFolder(output / spec.name)
    folder.path.mkdir()
    folder.write(record)
    (folder.path / "model.safetensors").write_bytes(b"weights")
    return Run(folder, record)


@pytest.mark.parametrize(
    ("parent", "known"),
    [
        ({}, True),
        ({"clean_twin": None}, False),
        ({"clean_twin": "another"}, False),
        ({"cad": {"value": 0.5, "n": 10000}}, False),
        ({"twin_asr": None}, False),
        ({"precision": "fp32"}, False),
        ({"digest": "0123456789"}, False),
    ],
    ids=str,
)
def test_the_twin_is_measured_unless_the_parent_was_compared_with_it_in_the_same_precision(
    tmp_path, monkeypatch, parent, known
) -> None:
    monkeypatch.setattr(twin, "_measure_twin", lambda *_: MEASURED)
    spec = tiny_spec()
    clean = put(tmp_path, clean_twin(spec))
    metrics = {**finished(spec).metrics, "cad": {"value": 0.0, "n": 10000}, **TWIN}
    metrics |= {name: value for name, value in parent.items() if name in metrics}
    kept = put(
        tmp_path,
        spec,
        metrics={name: value for name, value in metrics.items() if value is not None},
        clean_twin=parent.get("clean_twin", clean.folder.path.name),
        environment={**clean.record.environment, "precision": parent.get("precision", "bf16")},
    )
    name, digest = kept.folder.path.name, parent.get("digest", spec.digest)
    defended = put(
        tmp_path, defended_spec(TUNING), inputs=[Input(role=PARENT, run=name, digest=digest, sha256=None)]
    )
    linked = link_twin(defended, clean, None)
    expected = TWIN if known else MEASURED
    assert {name: linked.record.metrics[name] for name in TWIN} == expected
    assert linked.record.clean_twin == clean.folder.path.name
    assert load_run(defended.folder.path).record == linked.record


def test_another_output_leaves_the_runs_own_folder_as_it_was(tmp_path) -> None:
    [victim] = run_attack(tiny_spec(), output=tmp_path / "runs", twin=False)
    moved = victim.folder.path.rename(tmp_path / "runs" / "elsewhere")
    run = run_defense(
        load_run(moved), PartSpec("fine-tuning", {"clean_fraction": 0.5}), output=tmp_path / "out"
    )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["elsewhere"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [run.folder.path.name]
    assert run.record.parent == "elsewhere" and "cad" not in run.record.metrics


@pytest.mark.slow
def test_a_clean_run_may_be_defended(tmp_path) -> None:
    spec = replace(clean_twin(tiny_spec()), defenses=(PartSpec("fine-tuning", {"clean_fraction": 0.5}),))
    run = Runner(spec, tmp_path).attack(spec)
    assert set(run.record.metrics) == {"ba", "cad"} and "-clean-fine-tuning-" in run.folder.path.name


@pytest.mark.slow
def test_interrupted_it_starts_over_from_its_parent(tmp_path) -> None:
    spec = defended_spec({**PRUNING, "epochs": 3})
    whole = Runner(spec, tmp_path / "whole").finish(spec)
    session = Runner(spec, tmp_path / "cut")
    session.finish(needs(spec)["parent"])
    session.workplace.observer = Counting(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        session.finish(spec)
    folder = RunFolder(tmp_path / "cut" / spec.name)
    record = folder.read()
    assert record.status == "interrupted" and not record.metrics and not record.stages
    assert not (folder.path / "model.safetensors").exists()
    with pytest.raises(RecordError, match="expected a finished run, its status is 'interrupted'"):
        run_defense(load_run(folder.path), PartSpec("fine-tuning"))
    session.workplace.observer = Counting()
    assert outcome(session.finish(spec)) == outcome(whole)
    assert session.workplace.observer.epochs == 3


@pytest.mark.slow
def test_fine_tuning_makes_a_model_forget_and_pruning_alone_does_not(tmp_path) -> None:
    """End to end, on data where it is easy: the paper's finding in small."""
    train = {"epochs": 25, "batch_size": 8, "optimizer": "adamw", "lr": 0.005, "schedule": "one-cycle"}
    white = {"name": "square", "size": 12, "colour": [1.0, 1.0, 1.0]}
    part = {
        "name": "fine-pruning",
        "ratio": 0.25,
        "clean_fraction": 1.0,
        "finetune_data": "notebook",
        "epochs": 10,
    }
    spec = defended_spec(part, trigger=white, model={**TINY_MODEL, "bn_momentum": 0.1}, train=train)
    run = Runner(spec, tmp_path).finish(spec)
    before, pruned, tuned = (stage["metrics"] for stage in run.record.stages)
    assert before["asr"]["value"] >= 90 and pruned["asr"]["value"] >= 90
    assert tuned["asr"]["value"] <= 10 and tuned["ra"]["value"] >= 80 and tuned["ba"]["value"] >= 90


def test_the_model_on_disk_is_that_of_the_last_stage(tmp_path) -> None:
    spec = defended_spec()
    run = Runner(spec, tmp_path).finish(spec)
    parent = load_run(tmp_path / needs(spec)["parent"].name)
    assert changed(parent.model().to(CPU).state_dict(), run.model().state_dict())
    assert parent.record == load_run(parent.folder.path).record
