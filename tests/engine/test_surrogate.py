"""Victims whose trigger is optimised on a surrogate: a run of its own, made once, and kept trigger files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import Tiny, count_hits, tiny_spec
from tiny_runs import Counting, outcome
from torch import nn

from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.analysis.preview import preview_run, preview_spec
from backdoorbench_moe.bench.running.engines import ray_folders
from backdoorbench_moe.bench.running.estimate import Speed, seconds_left
from backdoorbench_moe.bench.running.plan import Planned
from backdoorbench_moe.config import PartSpec, build_spec, spec_from_dict
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.graph import clean_twin, in_order, lineage, needs, reference
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import Runner, run_attack, run_defense
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.records import RunFolder
from backdoorbench_moe.triggers.narcissus import Narcissus

TUNING = PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1})


def spec_of(name: str = "narcissus", surrogate: str = "same", epochs: int = 2, **values):
    options = {"steps": 2} if name == "label-consistent" else {"steps": 2, "batch_size": 8}
    trigger = {"name": name, "surrogate": surrogate, **options}
    return tiny_spec(trigger=trigger, train={"epochs": epochs, "batch_size": 32, "lr": 0.1}, **values)


def trigger_bytes(run) -> bytes:
    return (run.folder.path / "trigger.safetensors").read_bytes()


# The graph


def test_the_surrogate_is_a_clean_run_that_arms_and_repeats_share() -> None:
    same, twin, other = (spec_of(surrogate=name) for name in ("same", "twin", "wide_resnet"))
    clean = clean_twin(same)
    assert needs(same) == {"surrogate": clean} and reference(same) == clean
    assert needs(twin) == {"surrogate": replace(clean, seed=1)}
    assert needs(other) == {"surrogate": replace(clean, model=PartSpec("wide_resnet"))}
    assert needs(clean) == {} and needs(tiny_spec()) == {}
    defended = replace(twin, defenses=(TUNING,))
    assert needs(defended) == {"parent": twin}
    assert list(lineage(defended)) == [replace(clean, seed=1), twin, defended]
    arms = [spec_of(), spec_of("trojan-nn"), spec_of(applicator="patch")]
    assert [each.attacked for each in in_order(arms)] == [False, True, True, True]
    repeats = [replace(twin, seed=seed) for seed in range(3)]
    assert [each.seed for each in in_order(repeats) if not each.attacked] == [1, 0, 2, 3]


def test_another_architecture_has_the_options_of_the_recipe_and_the_rest_of_the_victim() -> None:
    spec = build_spec({"trigger": {"name": "narcissus", "surrogate": "wide_resnet"}, "train": {"epochs": 3}})
    [surrogate] = needs(spec).values()
    assert surrogate.model == PartSpec("wide_resnet", {"widen_factor": 1, "bn_momentum": 0.1})
    assert surrogate == replace(clean_twin(spec), model=surrogate.model) and surrogate.train.epochs == 3


def test_the_options_of_another_architecture_are_part_of_the_spec() -> None:
    """So a recipe that changes gives another run, and a spec that is read back has the surrogate it was made with."""
    values = {"trigger": {"name": "narcissus", "surrogate": "wide_resnet"}}
    wide, wider = build_spec(values), build_spec(values, {"surrogate": {"widen_factor": 2}})
    assert wider.surrogate == PartSpec("wide_resnet", {"widen_factor": 2, "bn_momentum": 0.1})
    assert needs(wider)["surrogate"].model == wider.surrogate
    assert len({each.digest for each in (wide, wider, replace(wide, surrogate=None))}) == 3
    for spec in (wide, wider, replace(wide, surrogate=None)):
        again = spec_from_dict(spec.to_dict())
        assert again == spec and needs(again) == needs(spec)
        assert not {"surrogate", "files"} & clean_twin(spec).to_dict().keys()


def test_options_that_an_architecture_has_by_default_are_not_written() -> None:
    """The digests of runs with a clean twin as surrogate, and of one without options, are those they always had."""
    for name in ("same", "twin", "preact_resnet18"):
        assert "surrogate" not in build_spec({"trigger": {"name": "narcissus", "surrogate": name}}).to_dict()


def test_a_file_of_a_surrogate_is_not_that_of_the_victim() -> None:
    """Both have an option of this name; the spec of the surrogate has the hash of its own file."""
    spec = replace(
        spec_of(surrogate="wide_resnet"),
        surrogate=PartSpec("wide_resnet", {"init": "b.npz"}),
        model=PartSpec("pmoe", {"init": "a.npz"}),
        files={"model.init": "aa", "surrogate.init": "bb"},
    )
    assert needs(spec)["surrogate"].files == {"model.init": "bb"} and clean_twin(spec).files == {
        "model.init": "aa"
    }
    assert spec.without_paths().surrogate == PartSpec("wide_resnet", {"init": None})


def test_the_optimisation_is_part_of_the_estimate() -> None:
    images, speed = Tiny().load(), Speed(train=10.0, predict=1e9)
    spec = tiny_spec(
        trigger={"name": "label-consistent", "surrogate": "same", "steps": 7}, poison={"rate": 0.25}
    )
    left = partial(seconds_left, speed=speed, images=images, model=nn.Linear(1, 1))
    plain = left(Planned(tiny_spec(), "missing"))
    assert plain is not None and left(Planned(spec, "missing")) == pytest.approx(plain + 7 * 24 / 10)
    begun = left(Planned(spec, "interrupted", epochs=1))
    assert begun == pytest.approx(left(Planned(tiny_spec(), "interrupted", epochs=1)))


# A run and its folder


@pytest.mark.parametrize("applicator", ["image", "patch"])
@pytest.mark.parametrize("name", ["narcissus", "label-consistent", "trojan-nn", "routing"])
def test_a_victim_can_be_measured_again_without_its_surrogate(tmp_path, name: str, applicator: str) -> None:
    spec = spec_of(name, epochs=1, applicator=applicator)
    if (name, applicator) == ("routing", "patch"):
        with pytest.raises(ConfigError, match="applicator: the trigger 'routing' touches every patch"):
            run_attack(spec, output=tmp_path)
        assert not list(tmp_path.iterdir()), "nothing was trained"
        return
    [run] = run_attack(spec, output=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([clean_twin(spec).name, spec.name])
    [given] = run.record.inputs
    assert (given["role"], given["run"]) == ("surrogate", clean_twin(spec).name)
    values = run.record.parts["trigger"]
    assert values["surrogate"] == "same" and len(values["state_sha256"]) == 64
    assert any(key.endswith("_before") for key in values), "what the optimisation reached"
    assert run.record.timing["trigger_seconds"] > 0 and "twin_asr" in run.record.metrics
    shutil.rmtree(tmp_path / clean_twin(spec).name)
    again = load_run(run.folder.path)
    images, attack = Tiny().load(), again.attack()
    triggered = triggered_test(images, attack, again.stamper())
    hits = count_hits(again.model(), Split(triggered.images, triggered.wanted))
    assert run.value("asr") == 100 * hits / len(triggered)
    blank = triggered_test(images, attack, again.blank_stamper())
    # The test form of label-consistent is not learned.
    assert torch.equal(blank.images, triggered.images) == (name == "label-consistent")


def test_the_victim_trains_on_the_learned_training_form(tmp_path, monkeypatch) -> None:
    """The images that the victim sees are those that its folder's trigger stamps."""
    from backdoorbench_moe.engine.makers import train

    seen, inner = [], train.fit

    def fit(model, split, *args, **more):
        seen.append(split.copy())
        return inner(model, split, *args, **more)

    monkeypatch.setattr(train, "fit", fit)
    [run] = run_attack(spec_of(epochs=1), output=tmp_path)
    clean, split = (Tiny().load().train, seen[-1])
    places = torch.from_numpy(run.folder.load_poison())
    expected = clean.images.clone()
    stamped = run.stamper().training(clean.images[places] / 255, places)
    expected[places] = (stamped * 255).round().byte()
    assert torch.equal(split.images, expected) and not torch.equal(split.images, clean.images)


@pytest.mark.slow
def test_the_same_spec_gives_the_same_trigger_anywhere(tmp_path) -> None:
    first, again = (run_attack(spec_of(epochs=1), output=tmp_path / name, twin=False)[0] for name in "ab")
    assert trigger_bytes(first) == trigger_bytes(again) and outcome(first) == outcome(again)
    twin = run_attack(spec_of(surrogate="twin", epochs=1), output=tmp_path / "a", twin=False)[0]
    assert trigger_bytes(twin) != trigger_bytes(first), "optimised on another model"


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_trigger_it_has(tmp_path, monkeypatch) -> None:
    spec = spec_of(epochs=3)
    [whole] = run_attack(spec, output=tmp_path / "whole", twin=False)
    with pytest.raises(KeyboardInterrupt):
        # The surrogate has three epochs as well.
        run_attack(spec, output=tmp_path / "cut", twin=False, observer=Counting(stop_after=4))
    monkeypatch.setattr(Narcissus, "optimise", lambda *_: pytest.fail("optimised again"))
    [resumed] = run_attack(spec, output=tmp_path / "cut", twin=False)
    assert outcome(resumed) == outcome(whole) and trigger_bytes(resumed) == trigger_bytes(whole)
    assert resumed.record.parts == whole.record.parts


@pytest.mark.slow
def test_a_run_that_was_stopped_while_it_optimised_goes_on(tmp_path, monkeypatch) -> None:
    spec = spec_of(epochs=1)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Narcissus, "optimise", stop)
        with pytest.raises(KeyboardInterrupt):
            run_attack(spec, output=tmp_path, twin=False)
    assert load_run(tmp_path / spec.name).record.status == "interrupted"
    [run] = run_attack(spec, output=tmp_path, twin=False)
    [other] = run_attack(spec, output=tmp_path / "other", twin=False)
    assert outcome(run) == outcome(other)


@pytest.mark.slow
def test_a_defended_run_keeps_the_trigger_itself(tmp_path) -> None:
    [run] = run_attack(spec_of(epochs=1), output=tmp_path)
    defended = run_defense(run, TUNING)
    assert trigger_bytes(defended) == trigger_bytes(run)
    assert defended.record.stages[0]["metrics"]["asr"] == run.record.metrics["asr"]
    images = torch.rand(2, 3, 32, 32)
    stamped = run.stamper()(images)
    shutil.rmtree(run.folder.path)
    assert torch.equal(load_run(defended.folder.path).stamper()(images), stamped)


@pytest.mark.slow
def test_an_analysis_and_a_preview_show_the_learned_trigger(tmp_path) -> None:
    [run] = run_attack(spec_of("routing", epochs=1), output=tmp_path)
    assert analyze_run(run).findings.capture is not None
    shown = preview_run(run, images=3)
    stamped = run.stamper()(shown.clean / 255)
    assert torch.equal(shown.triggered, (stamped * 255).round().byte())
    with pytest.raises(
        ConfigError, match="trigger: 'routing' is learned while a run is made; give the run with --run"
    ):
        preview_spec(run.spec, images=3)


def test_what_a_cluster_sends_of_a_run_includes_its_trigger(tmp_path) -> None:
    """See `ray_folders.SENT`."""
    [run] = run_attack(spec_of(epochs=1), output=tmp_path, twin=False)
    home = RunFolder(tmp_path / "home" / run.folder.path.name)
    home.path.parent.mkdir()
    ray_folders.deliver(home, ray_folders.read_files(run.folder))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_run(home.path).stamper()(images), run.stamper()(images))


# What has changed


def test_another_trigger_file_is_refused(tmp_path) -> None:
    [run] = run_attack(spec_of(epochs=1), output=tmp_path, twin=False)
    state = run.folder.load_trigger()
    run.folder.save_trigger({"pattern": state["pattern"] * 0.5})
    with pytest.raises(RecordError, match="is not the one that the run used"):
        load_run(run.folder.path).stamper()
    (run.folder.path / "trigger.safetensors").unlink()
    with pytest.raises(RecordError, match=r"trigger file .*: not found"):
        run_defense(run, TUNING)


@pytest.mark.slow
def test_another_surrogate_is_refused(tmp_path) -> None:
    spec = spec_of(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=tmp_path, twin=False, observer=Counting(stop_after=3))
    clean = load_run(tmp_path / clean_twin(spec).name)
    tensors, header = clean.folder.load_tensors()
    tensors["head.bias"] += 1
    clean.folder.save_model(tensors, header)
    with pytest.raises(RecordError, match="was replaced after the run was finished"):
        run_attack(spec, output=tmp_path, twin=False)
    clean.record.model_sha256 = clean.folder.model_sha256
    clean.folder.write(clean.record)
    with pytest.raises(
        RecordError, match=f"the model of {clean.folder.path.name} has changed since the run was started"
    ):
        run_attack(spec, output=tmp_path, twin=False)


# What does not fit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"surrogate": "twinn"}, r"trigger\.surrogate: unknown 'twinn'; did you mean 'twin'"),
        ({"name": "routing", "surrogate": "wide_resnet"}, r"trigger\.surrogate: expected a routed model"),
        (
            {"poison": {"rate": 0.25, "mapping": "all-to-all"}},
            r"poison\.mapping: the trigger 'narcissus' needs one target class",
        ),
    ],
    ids=["unknown", "dense", "all-to-all"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, values: dict, message: str
) -> None:
    spec = spec_of(**values)
    with pytest.raises(ConfigError, match=message):
        run_attack(spec, output=tmp_path)
    with pytest.raises(ConfigError, match=message):
        Runner(spec, tmp_path).maker(spec)
    assert not list(tmp_path.iterdir())


def test_a_learned_trigger_cannot_be_a_mark(tmp_path) -> None:
    marked = {"trigger": {"name": "narcissus", "surrogate": "twin"}, "applicator": "image"}
    spec = build_spec({"dataset": "tiny", "model": "convnext", "attack": "moevil", **marked})
    with pytest.raises(ConfigError, match="trigger: expected one that is not learned, as the mark of images"):
        Runner(spec, tmp_path).maker(spec)


@pytest.mark.parametrize(
    ("surrogate", "options", "message"),
    [
        ("same", {"name": "pmoe"}, "surrogate: expected none, as trigger.surrogate is 'same'"),
        ("twin", {"widen_factor": 1}, "surrogate: expected none, as trigger.surrogate is 'twin'"),
        ("wide_resnet", {"name": "pmoe"}, r"surrogate\.name: expected .*'wide_resnet'\), got 'pmoe'"),
        (
            "wide_resnet",
            {"widen": 1},
            r"model 'wide_resnet': option: unknown 'widen'; did you mean 'widen_factor'",
        ),
    ],
)
def test_options_of_a_surrogate_that_does_not_exist_are_refused(
    tmp_path, surrogate: str, options: dict, message: str
) -> None:
    trigger = {"name": "narcissus", "surrogate": surrogate, "steps": 2}
    with pytest.raises(ConfigError, match=message):
        run_attack(tiny_spec(trigger=trigger, surrogate=options), output=tmp_path)
    assert not list(tmp_path.iterdir())
