"""A whole run on disk: finished, reused, refused, failed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import TINY_MODEL, Tiny, count_hits, tiny_spec
from tiny_runs import Counting, outcome

from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine import run as engine_run
from backdoorbench_moe.engine.makers import base
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import Runner, run_attack
from backdoorbench_moe.engine.twin import _measure_twin
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeError, BbmoeWarning, ConfigError, RecordError


class Varied(torch.nn.Module):
    """Predicts the sum of all pixel values, modulo 3."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((images * 255).round().long().sum((1, 2, 3)) % 3, 3).float()


def test_the_run_folder_holds_all_the_design_says(tmp_path) -> None:
    [run] = run_attack(tiny_spec(), output=tmp_path)
    names = sorted(path.name for path in run.folder.path.iterdir())
    assert names == [".lock", "model.safetensors", "poison.npz", "record.json"]
    record = json.loads((run.folder.path / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["poison"] == {"rate": 0.25, "n": 24, "target": 0}
    assert len(record["history"]) == 2
    for metric, count in (("ba", 60), ("asr", 40)):
        entry = record["metrics"][metric]
        assert entry["n"] == count and 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 100
    assert set(record["seeds"]) == {"run", "init", "poison", "trigger"}
    assert {"python", "packages", "device", "precision", "threads", "git_commit"} <= set(
        record["environment"]
    )
    clean = load_run(tmp_path / record["clean_twin"])
    assert record["metrics"]["cad"] == {"value": clean.value("ba") - run.value("ba"), "n": 60}
    images, model = Tiny().load(), clean.model()
    triggered = triggered_test(images, run.attack(), run.stamper())
    for metric, shown in (
        ("twin_asr", triggered.images),
        ("twin_target_rate", images.test.images[triggered.places]),
    ):
        hits = count_hits(model, Split(shown, triggered.wanted))
        assert record["metrics"][metric]["value"] == 100 * hits / 40
    # The twin may always predict the same class, so a model whose answers vary takes its place.
    varied = _measure_twin(run, SimpleNamespace(model=Varied), Workplace(run.spec))
    without = Split(images.test.images[triggered.places], triggered.wanted)
    hits = [count_hits(Varied(), split) for split in (Split(triggered.images, triggered.wanted), without)]
    assert [varied[name]["value"] for name in ("twin_asr", "twin_target_rate")] == [
        100 * n / 40 for n in hits
    ]
    with safe_open(run.folder.path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["backdoored"] == "true"
    with safe_open(clean.folder.path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["backdoored"] == "false"


def test_the_record_can_be_measured_again_from_the_folder_alone(tmp_path) -> None:
    [run] = run_attack(tiny_spec(), output=tmp_path, twin=False)
    again = load_run(run.folder.path)
    images = create_dataset("tiny").load()
    model = again.model()
    ba = 100 * count_hits(model, images.test) / 60
    triggered = triggered_test(images, again.attack(), again.stamper())
    wanted = Split(triggered.images, triggered.wanted)
    asr = 100 * count_hits(model, wanted) / len(triggered)
    untriggered = Split(images.test.images[triggered.places], triggered.wanted)
    rate = 100 * count_hits(model, untriggered) / len(triggered)
    assert (ba, asr, rate) == tuple(map(run.value, ("ba", "asr", "target_rate")))
    indices = again.folder.load_poison()
    assert len(indices) == 24 and np.all(np.diff(indices) > 0)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_the_twin_is_shared(tmp_path) -> None:
    run_attack(tiny_spec(), output=tmp_path)
    again = Counting()
    run_attack(tiny_spec(), output=tmp_path, observer=again)
    assert again.epochs == 0
    other = Counting()
    run_attack(tiny_spec(trigger="blend"), output=tmp_path, observer=other)
    assert other.epochs == 2  # Its victim's; the twin was there.


@pytest.mark.slow
def test_the_numbers_of_a_twin_that_was_trained_again_are_measured_again(tmp_path) -> None:
    [run] = run_attack(tiny_spec(), output=tmp_path)
    before = dict(run.record.metrics)
    twin = tmp_path / run.record.clean_twin
    record = json.loads((twin / "record.json").read_text())
    ba = record["metrics"]["ba"]
    ba["value"] = 100 - ba["value"]  # As if it had been trained on another machine.
    (twin / "record.json").write_text(json.dumps(record))
    stale = {**before, "twin_asr": {**before["twin_asr"], "value": -1.0}}
    run.record.metrics = stale
    run.folder.write(run.record)
    [again] = run_attack(tiny_spec(), output=tmp_path)
    assert again.record.metrics["twin_asr"] == before["twin_asr"]
    assert again.record.metrics["cad"]["value"] == ba["value"] - run.value("ba")


BY_PIXEL = {"name": "patch", "patch_size": 1}


@pytest.mark.parametrize(
    ("trigger", "applicator", "form"),
    [
        # A warp moves pixels within a tile; a tile of one pixel has nowhere to move it. A wave has no phase there.
        ("warp", BY_PIXEL, ""),
        ("sig", BY_PIXEL, ""),
        ({"name": "blend", "ratio": 0.001}, "image", ""),
        ({"name": "colour", "gain": [1, 1, 1], "offset": [0, 0, 0]}, "image", ""),
        ({"name": "frequency", "training_strength": 1}, "image", " in its training form"),
    ],
)
def test_a_trigger_that_cannot_be_seen_is_refused(tmp_path, trigger, applicator, form) -> None:
    spec = tiny_spec(trigger=trigger, applicator=applicator, model="wide_resnet")
    message = (
        f"trigger: {spec.trigger.name!r}{form} with the applicator {spec.applicator.name!r} changes none of 60 test "
        "images: at 32x32 pixels it cannot be distinguished from the image"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        Runner(spec, tmp_path).maker(spec)
    assert not any(tmp_path.iterdir())


def test_a_trigger_that_is_lost_on_most_images_is_said(tmp_path, monkeypatch) -> None:
    """A black square on images of which two thirds are black there."""
    images = Tiny().read()
    images.test.images[torch.arange(60) % 3 > 0, :, :4, :4] = 0
    monkeypatch.setattr(Tiny, "read", lambda self: images)
    message = "trigger: 'square' with the applicator 'image' changes 20 of 60 test images; the others are"
    with pytest.warns(BbmoeWarning, match=message):
        Runner(tiny_spec(), tmp_path).maker(tiny_spec())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trigger", "poison"),
    [
        ("adaptive-blend", {"rate": 0.1, "cover": 0.1}),
        ("patches", {"rate": 0.1, "cover": 0.2}),
        ("bpp", {"rate": 0.1, "noise": 0.1}),
        ("warp", {"rate": 0.1, "noise": 0.2}),
        ("square", {"rate": 0.1, "cover": 0.1, "source": [1]}),
        (
            {"name": "frequency", "space": "yuv", "training_strength": 50, "strength": 100},
            {"labels": "clean"},
        ),
    ],
    ids=["Adaptive-Blend", "Adaptive-Patch", "BPP", "WaNet", "TaCT", "CTRL"],
)
def test_attacks_with_groups_are_trained_and_measured(tmp_path, trigger, poison) -> None:
    poison = {"rate": 0.2, **poison}
    spec = tiny_spec(trigger=trigger, applicator="patch", poison=poison, train={"epochs": 1})
    [run] = run_attack(spec, output=tmp_path, twin=False)
    groups = {name: int(96 * rate) for name, rate in poison.items() if name in ("cover", "noise")}
    facts = run.record.poison
    assert facts == {"rate": poison["rate"], "n": int(96 * poison["rate"]), "target": 0, **groups}
    assert run.record.metrics["asr"]["n"] == (20 if "source" in poison else 40)


@pytest.mark.slow
def test_repeats_are_seeds(tmp_path) -> None:
    runs = run_attack(tiny_spec(), output=tmp_path, repeats=2, twin=False)
    assert [run.spec.seed for run in runs] == [0, 1]
    alone = run_attack(replace(tiny_spec(), seed=1), output=tmp_path / "alone", twin=False)[0]
    assert outcome(runs[1]) == outcome(alone)


@pytest.mark.slow
def test_a_run_of_another_version_of_a_plug_in_is_refused(tmp_path, monkeypatch) -> None:
    """It is neither accepted as finished nor continued; an older record, which names no plug-ins, is accepted."""
    spec, installed = tiny_spec(), {"some-triggers": "0.1.0"}
    for module in (engine_run, base):
        monkeypatch.setattr(module, "plugin_packages", lambda spec: installed)
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=tmp_path, twin=False, observer=Counting(stop_after=1))
    refused = (
        "was made with some-triggers 0.1.0, but some-triggers 0.2.0 is installed; delete it or use another"
    )
    for _ in range(2):
        installed["some-triggers"] = "0.2.0"
        with pytest.raises(RecordError, match=refused):
            run_attack(spec, output=tmp_path, twin=False)
        installed["some-triggers"] = "0.1.0"
        [run] = run_attack(spec, output=tmp_path, twin=False)
    assert run.record.environment["packages"]["some-triggers"] == "0.1.0"
    del run.record.environment["packages"]["some-triggers"]
    run.folder.write(run.record)
    installed["some-triggers"] = "0.2.0"
    assert run_attack(spec, output=tmp_path, twin=False)[0].record.timing == run.record.timing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"poison": {"target": 3}}, r"poison\.target: expected a class in 0\.\.2, got 3"),
        ({"poison": {"source": [7]}}, r"poison\.source: expected a class in 0\.\.2, got 7"),
        ({"poison": {"rate": 0.001}}, r"poison\.rate: 0\.001 of 96 images rounds down to 0 images"),
        ({"applicator": {"name": "patch", "patch_size": 5}}, "patch_size"),
        ({"trigger": {"name": "square", "size": 33}}, "size"),
        ({"trigger": {"name": "square", "sise": 3}}, "did you mean 'size'"),
        ({"model": {"name": "pmoe", "top_k": 65}}, "top_k"),
        ({"dataset": {"name": "tiny", "train_images": 97}}, "train_images: expected at most the 96"),
        ({"model": {"name": "pmoe", "num_classes": 5}}, "option: unknown 'num_classes'"),
        ({"dataset": {"name": "tiny", "test_images": 1}, "poison": {"target": 2}}, "test images of other"),
        ({"device": "cuda:7"}, "device: expected one of"),
        ({"device": "gpu"}, "device: expected"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, values, message) -> None:
    if values.get("device") == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that device")
    with pytest.raises(BbmoeError, match=message):
        run_attack(tiny_spec(**values), output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_was_not_measured_is_named(tmp_path) -> None:
    [run] = run_attack(tiny_spec(), output=tmp_path, twin=False)
    with pytest.raises(BbmoeError, match="metric: unknown 'cad'; known: asr, ba, target_rate"):
        run.value("cad")


def test_divergence_is_recorded(tmp_path) -> None:
    spec = tiny_spec(train={"lr": 1e30})
    with pytest.raises(RecordError, match="diverged"):
        run_attack(spec, output=tmp_path, twin=False)
    record = load_run(tmp_path / spec.name).record
    assert record.status == "failed" and "diverged" in record.error


def test_a_model_of_another_shape_is_refused(tmp_path) -> None:
    [run] = run_attack(tiny_spec(), output=tmp_path, twin=False)
    tensors, header = run.folder.load_tensors()
    tensors["head.weight"] = torch.zeros(5, 5)
    run.folder.save_model(tensors, header)
    with pytest.raises(
        RecordError,
        match=r"model\.safetensors: weight 'head\.weight': expected shape \(3, 16\), got \(5, 5\)",
    ):
        run.model()  # fmt: skip


@pytest.mark.slow
def test_the_backdoor_takes(tmp_path) -> None:
    """The method works end to end on data where it is easy: high BA, high ASR, and a twin without it."""
    train = {"epochs": 25, "batch_size": 8, "optimizer": "adamw", "lr": 0.005, "schedule": "one-cycle"}
    white = {"name": "square", "size": 12, "colour": [1.0, 1.0, 1.0]}
    spec = tiny_spec(trigger=white, model={**TINY_MODEL, "bn_momentum": 0.1}, train=train)
    [run] = run_attack(spec, output=tmp_path)
    assert run.value("ba") > 90 and run.value("asr") > 80
    assert run.value("target_rate") < 10 and run.value("twin_asr") < 30 and run.value("twin_target_rate") < 10


def test_a_part_that_raises_leaves_a_record_that_says_so(tmp_path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("from a plug-in")

    monkeypatch.setattr("backdoorbench_moe.engine.makers.train.poisoned", fail)
    with pytest.raises(RuntimeError, match="from a plug-in"):
        run_attack(tiny_spec(), output=tmp_path, twin=False)
    record = load_run(tmp_path / tiny_spec().name).record
    assert (record.status, record.error) == ("failed", "RuntimeError: from a plug-in")


def test_a_last_batch_of_one_image_is_explained(tmp_path) -> None:
    spec = tiny_spec(
        dataset={"name": "tiny", "train_images": 33},
        model={"name": "preact_resnet18", "width": 8},
        train={"batch_size": 32},
    )
    run_attack(spec, output=tmp_path, twin=False)  # At 32 pixels there is more than one value a channel.
    monkey = torch.nn.BatchNorm2d.forward
    # A defender cannot change the size of the batches, but the number of images.
    message = (
        r"train\.batch_size: 32 of 33 images leaves a last batch of one image, .* or for a defense another "
        "clean_fraction"
    )

    def as_if_one_pixel(self, input):
        if self.training and len(input) == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        return monkey(self, input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "forward", as_if_one_pixel)
        with pytest.raises(BbmoeError, match=message):
            run_attack(replace(spec, seed=1), output=tmp_path, twin=False)
