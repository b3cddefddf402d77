"""Imported models, and trainings that start from a file: what is read, measured, recorded, frozen and refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TINY_MODEL, Tiny, count_hits, tiny_spec
from tiny_runs import Counting, outcome
from torch import nn

from backdoorbench_moe.config import PartSpec, RunSpec, spec_from_dict
from backdoorbench_moe.engine.graph import NodeKind, kind_of, needs, reference
from backdoorbench_moe.engine.provenance import origin_of
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack, run_defense, run_import
from backdoorbench_moe.engine.training.freezing import freezing, frozen_names
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, RecordError, UnknownNameError
from backdoorbench_moe.models import create_model

SMALL = {"name": "wide_resnet", "widen_factor": 1}
OPTIONS = {"widen_factor": 1}
TUNING = PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1})


def train_elsewhere(mean: float = 0.5, std: float = 0.1) -> nn.Module:
    """A model trained by plain PyTorch code, on normalised images."""
    torch.manual_seed(0)
    model = create_model("wide_resnet", num_classes=3, bn_momentum=0.1, **OPTIONS)
    split = Tiny().load().train
    images = (split.images.float() / 255 - mean) / std
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), split.labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def elsewhere() -> nn.Module:
    return train_elsewhere()


@pytest.fixture
def file(elsewhere, tmp_path) -> Any:
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in elsewhere.state_dict().items()}}, tmp_path / "w.pth"
    )
    return tmp_path / "w.pth"


def imported(file: Any, model: dict[str, Any] = SMALL, **options: Any) -> RunSpec:
    given = {"mean": [0.5] * 3, "std": [0.1] * 3, **options}
    part = {**model, "weights": str(file), **{k: v for k, v in given.items() if v is not None}}
    return tiny_spec(attack="imported", trigger=None, applicator=None, poison={"rate": 0.0}, model=part)


def test_a_model_made_elsewhere_becomes_a_run_with_its_accuracy(elsewhere, file, tmp_path) -> None:
    observer = Counting()
    run = run_import(imported(file), output=tmp_path / "runs", observer=observer)
    test = Tiny().load().test
    hits = int((elsewhere((test.images.float() / 255 - 0.5) / 0.1).argmax(1) == test.labels).sum())
    assert hits > 40
    assert run.record.metrics["ba"]["value"] == pytest.approx(100 * hits / 60)
    assert {"low", "high"} <= run.record.metrics["ba"].keys() and "asr" not in run.record.metrics
    assert count_hits(run.model(), test) == hits
    assert run.spec.imported and not run.spec.attacked and run.record.poison is None
    assert run.folder.path.name.startswith("tiny-wide_resnet-imported-s0-")
    start = run.record.parts["model"]["start"]
    assert start["sha256"] == run.spec.files["model.weights"] and len(start["notes"]) == 2
    assert len([text for text in observer.messages if "prefix 'module.'" in text]) == 1, "it is read once"
    assert origin_of(run) == "unknown"
    assert spec_from_dict(run.record.spec) == run.spec and load_run(run.folder.path).record == run.record


def test_the_file_is_part_of_the_digest_by_its_content(elsewhere, file, tmp_path) -> None:
    first = run_import(imported(file), output=tmp_path / "runs")
    file.rename(moved := tmp_path / "other.pth")
    again = run_import(imported(moved), output=tmp_path / "runs", observer=(observer := Counting()))
    assert again.folder.path == first.folder.path and observer.epochs == 0
    save_file(
        {n: t + 0.001 if t.is_floating_point() else t for n, t in elsewhere.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    other = run_import(imported(tmp_path / "w.safetensors"), output=tmp_path / "runs")
    assert other.folder.path != first.folder.path


def test_it_is_compared_with_nothing_and_made_from_nothing(file) -> None:
    spec = imported(file)
    assert (kind_of(spec), needs(spec), reference(spec)) == (NodeKind.IMPORTED, {}, None)
    defended = spec_from_dict({**spec.to_dict(), "defenses": [{"name": "strip"}]})
    assert kind_of(defended) is NodeKind.DEFENDED and reference(defended) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine-tuning", "fine-pruning", "strip", "neural-cleanse", "spectral"])
def test_it_is_defended_without_a_trigger(name, file, tmp_path) -> None:
    from backdoorbench_moe import defenses

    run = run_import(imported(file), output=tmp_path / "runs")
    options = dict(defenses.registry.lookup(name).tiny)
    if "clean_fraction" in defenses.registry.options(name):
        options["clean_fraction"] = 0.5
    defended = run_defense(run, PartSpec(name, options))
    assert defended.record.stages[0]["metrics"]["ba"] == run.record.metrics["ba"]
    assert "asr" not in defended.record.metrics and "ba" in defended.record.metrics
    assert origin_of(defended) == "unknown" and defended.record.clean_twin is None
    again = run_defense(defended, TUNING)
    assert origin_of(again) == "unknown"


def test_a_file_that_says_that_it_is_backdoored_is_believed_and_one_that_says_clean_is_not(
    elsewhere, tmp_path
) -> None:
    for said, origin in (("true", "true"), ("false", "unknown"), ("no idea", "unknown")):
        save_file(dict(elsewhere.state_dict()), tmp_path / f"{said}.safetensors", {"backdoored": said})
        run = run_import(imported(tmp_path / f"{said}.safetensors"), output=tmp_path / said)
        assert origin_of(run) == origin


def test_a_wrong_normalisation_is_warned_of(file, tmp_path) -> None:
    with pytest.warns(
        BbmoeWarning, match=r"model\.mean: with the mean and standard deviation of '\w+' the accuracy"
    ):
        run = run_import(imported(file, mean=[0.0] * 3, std=[1.0] * 3), output=tmp_path / "runs")
    assert "with the given ones" in run.record.parts["model"]["start"]["notes"][-1]


def test_a_normalised_and_resized_routed_model_is_imported(tmp_path) -> None:
    model = create_model(
        TINY_MODEL["name"], num_classes=3, **{k: v for k, v in TINY_MODEL.items() if k != "name"}
    ).eval()
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    run = run_import(imported(tmp_path / "w.safetensors", TINY_MODEL), output=tmp_path / "runs")
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        wanted = model.forward_routed((images - 0.5) / 0.1)
        got = run.model().forward_routed(images)
    assert torch.allclose(got.logits, wanted.logits, atol=1e-5)
    assert torch.equal(got.routing[0].selected, wanted.routing[0].selected)
    resized = run_import(
        imported(tmp_path / "w.safetensors", TINY_MODEL, resize=64), output=tmp_path / "runs"
    )
    assert resized.model().patch_size == 2 and resized.record.parts["model"]["patch_size"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"trigger": {"name": "square"}, "applicator": {"name": "image"}},
            "trigger: expected none, as the model is",
        ),
        ({"splitter": {"name": "classes"}}, "splitter: expected none"),
        ({"poison": {"rate": 0.1}}, "poison.rate: expected 0, as the model is imported"),
        ({"attack": {"name": "imported", "x": 1}}, "attack: expected no options"),
    ],
)
def test_what_an_imported_model_cannot_have_is_refused(change, message, file) -> None:
    values = imported(file).to_dict() | change
    with pytest.raises(ConfigError, match=message):
        spec_from_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "model.weights: expected the file of the model that is imported"),
        ({"weights": "nowhere.pth"}, "weights nowhere.pth: not found"),
        ({"widen_factor": 2}, "do not match the model: .* with another shape"),
        ({"name": "pmoe", "widen_factor": None}, "do not match the model: .* missing"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(options, message, file, tmp_path) -> None:
    part = {**SMALL, "weights": str(file), **options}
    values = {key: value for key, value in part.items() if value is not None}
    spec = tiny_spec(attack="imported", trigger=None, applicator=None, poison={"rate": 0.0}, model=values)
    with pytest.raises((ConfigError, RecordError), match=message):
        run_import(spec, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_head_of_other_classes_cannot_be_imported(tmp_path) -> None:
    save_file(
        dict(create_model("wide_resnet", num_classes=7, **OPTIONS).state_dict()), tmp_path / "w.safetensors"
    )
    with pytest.raises(RecordError, match=r"head.weight \(expected 3x64, got 7x64\)"):
        run_import(imported(tmp_path / "w.safetensors"), output=tmp_path / "runs")


# Trainings that start from a file


def started(file: Any, train: dict[str, Any] | None = None, **options: Any) -> RunSpec:
    train = {"epochs": 2, "batch_size": 32, "lr": 0.05, **(train or {})}
    return tiny_spec(model={**SMALL, "weights": str(file), **options}, train=train)


def test_training_starts_from_the_file_and_is_resumed_without_it(elsewhere, tmp_path) -> None:
    save_file(dict(elsewhere.state_dict()), tmp_path / "w.safetensors")
    spec = started(tmp_path / "w.safetensors", mean="half")
    [run] = run_attack(spec, output=tmp_path / "whole", twin=False)
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=tmp_path / "parts", twin=False, observer=Counting(stop_after=1))
    (tmp_path / "w.safetensors").unlink()
    [resumed] = run_attack(run.spec, output=tmp_path / "parts", twin=False)
    assert outcome(resumed) == outcome(run)
    assert resumed.record.parts["model"] == run.record.parts["model"]
    assert origin_of(run) == "true"
    [fresh] = run_attack(
        tiny_spec(model={**SMALL, "mean": "half"}, train=spec.train.to_dict()),
        output=tmp_path / "n",
        twin=False,
    )
    assert fresh.record.history[0]["loss"] != run.record.history[0]["loss"]


def test_a_clean_run_from_a_file_of_unknown_origin_is_unknown(elsewhere, tmp_path) -> None:
    save_file(dict(elsewhere.state_dict()), tmp_path / "w.safetensors")
    [run] = run_attack(started(tmp_path / "w.safetensors"), output=tmp_path / "runs")
    twin = load_run(tmp_path / "runs" / run.record.clean_twin)
    assert (origin_of(run), origin_of(twin)) == ("true", "unknown")
    assert origin_of(run_defense(twin, TUNING)) == "unknown"


def test_a_changed_file_is_another_run_and_is_refused_for_the_old_one(
    elsewhere, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("backdoorbench_moe.engine.files.KEPT_BYTES", 10)
    save_file(dict(elsewhere.state_dict()), file := tmp_path / "w.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run_attack(started(file), output=tmp_path / "runs", twin=False, observer=Counting(stop_after=1))
    [folder] = (tmp_path / "runs").iterdir()
    old = load_run(folder).spec
    save_file({n: t + 1 if t.is_floating_point() else t for n, t in elsewhere.state_dict().items()}, file)
    with pytest.raises(RecordError, match=r"model\.weights: .* has changed"):
        run_attack(old, output=tmp_path / "runs", twin=False)
    [run] = run_attack(started(file), output=tmp_path / "runs", twin=False)
    assert run.folder.path != folder


def test_another_number_of_classes_gets_a_new_head_and_this_is_said(tmp_path) -> None:
    torch.manual_seed(5)
    save_file(
        dict(create_model("wide_resnet", num_classes=7, **OPTIONS).state_dict()), tmp_path / "w.safetensors"
    )
    [run] = run_attack(started(tmp_path / "w.safetensors"), output=tmp_path / "runs", twin=False)
    [note] = run.record.parts["model"]["start"]["notes"]
    assert "the head is randomly initialised: head.weight is 7x64 in the file and 3x64" in note
    with pytest.raises(RecordError, match="with another shape"):
        run_attack(started(tmp_path / "w.safetensors", head="keep"), output=tmp_path / "n", twin=False)


def test_frozen_layers_stay_bit_for_bit_with_their_statistics(elsewhere, tmp_path) -> None:
    save_file(dict(elsewhere.state_dict()), tmp_path / "w.safetensors")
    spec = started(tmp_path / "w.safetensors", train={"freeze": ["trunk.*", "block3.norm1.*"]})
    [run] = run_attack(spec, output=tmp_path / "runs", twin=False)
    before, after = elsewhere.state_dict(), run.model().state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(("trunk.", "block3.norm1."))}
    assert frozen <= same and not {
        name for name in same - frozen if name.endswith(("weight", "running_mean"))
    }
    assert all(parameter.requires_grad for parameter in run.model().parameters())
    tuned = run_defense(run, TUNING)
    assert any(
        not torch.equal(after[n], t) for n, t in tuned.model().state_dict().items() if n.startswith("trunk")
    )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["nothing.*"], "unknown 'nothing"),
        (["*"], "leave a parameter to train"),
        (["hed.weight"], "did you mean 'head.weight'"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(patterns, message, tmp_path) -> None:
    spec = tiny_spec(model=SMALL, train={"freeze": patterns})
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        run_attack(spec, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_freezing_is_undone(elsewhere) -> None:
    with freezing(elsewhere, ["head.*"]) as norms:
        assert not elsewhere.head.weight.requires_grad and norms == []
    assert elsewhere.head.weight.requires_grad
    with freezing(elsewhere, ["norm.weight", "block3.norm1.*"]) as norms:
        assert norms == [elsewhere.block3.norm1], "the other norm still learns its shift"
    assert frozen_names(elsewhere, ["head.w*", "*.bias"]) >= {"head.weight", "head.bias"}


def test_the_header_of_an_imported_model_file_says_unknown(file, tmp_path) -> None:
    run = run_import(imported(file), output=tmp_path / "runs")
    with safe_open(run.folder.path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["backdoored"] == "unknown"


@pytest.mark.parametrize(
    ("architecture", "small_stem", "doubtful"),
    [("test_resnet", None, True), ("test_resnet", False, False), ("test_resnet", True, False)],
)
def test_weights_that_fit_two_stems_are_warned_about(architecture, small_stem, doubtful, tmp_path) -> None:
    """The published stem has 3x3 convolutions too, so that only the stride tells the two models apart."""
    torch.manual_seed(0)
    torch.save(timm.create_model(architecture, num_classes=3).state_dict(), tmp_path / "w.pth")
    options = {} if small_stem is None else {"small_stem": small_stem}
    spec = imported(tmp_path / "w.pth", {"name": f"timm:{architecture}"}, **options)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        run = run_import(spec, output=tmp_path / "runs")
    found = [str(each.message) for each in given if "small_stem" in str(each.message)]
    notes = [note for note in run.record.parts["model"]["start"]["notes"] if "small_stem" in note]
    assert len(found) == len(notes) == int(doubtful)
    assert all("the published stride 2; set it to false" in text for text in found)
