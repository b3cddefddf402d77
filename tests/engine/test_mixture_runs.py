"""The runs of a mixture: what is trained and what is reused, interrupted and continued, and what the folders hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny import Tiny
from tiny_mixture import mixture_spec
from tiny_runs import Counting, outcome

import backdoorbench_moe as bbmoe
from backdoorbench_moe import data
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.engine.graph import base_of, clean_twin
from backdoorbench_moe.engine.makers.probe import load_probe_record
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import Runner, run_attack
from backdoorbench_moe.errors import RecordError

TUNING = PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1})


class Naming(Observer):
    """Notes what is trained: the folder of a run, or the name of an attack or a defense that tunes."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int, noun: str = "image") -> None:
        self.names.append(name.split("-s0-")[0].removeprefix("tiny-convnext-"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a mixture with all that it was made from, made without interruption."""
    output = tmp_path_factory.mktemp("whole") / "runs"
    data.registry.register("tiny")(Tiny)
    naming = Naming()
    run_attack(mixture_spec(), output=output, observer=naming)
    data.registry.unregister("tiny")
    assert naming.names == [
        "policy-clean",
        "expert0-clean",
        "expert1-clean",
        "moevil",
        "moevil",
        "moe2-top-k-moevil-square-patch",
        "moe2-top-k-clean",
    ]
    return output


@pytest.fixture
def output(whole, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "runs")
    return tmp_path / "runs"


def find(output: Path, part: str):
    [path] = output.glob(f"*-{part}-*")
    return load_run(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"attack": "hdpo"}, ["hdpo", "hdpo", "moe2-top-k-hdpo-square-patch"]),
        ({"gate": "soft"}, ["moe2-soft-moevil-square-patch", "moe2-soft-clean"]),
        ({"gate": "hidden"}, []),
        ({"mixture": {"poisoned_experts": [0]}}, ["moevil", "moevil", "moe2-top-k-moevil-square-patch"]),
        ({"mixture": {"poisoned_experts": [0, 1]}}, ["moevil", "moevil", "moe2-top-k-moevil-square-patch"]),
        (
            {"mixture": {"experts": 3}},
            ["expert2-clean", "moe3-top-k-moevil-square-patch", "moe3-top-k-clean"],
        ),
    ],
    ids=str,
)
def test_another_arm_trains_only_what_it_does_not_share(output, values, expected) -> None:
    naming, before = Naming(), {path.name for path in output.iterdir()}
    [run] = run_attack(mixture_spec(**values), output=output, observer=naming)
    assert naming.names == expected
    known = {each["run"] for each in run.record.inputs} & before
    assert len(known) >= 2 and any("policy" in name for name in known)


# Epochs: 2 of the base, 2 of each of two experts, 2 of the attack, 2 of the gates, 2 of the twin's gates.
@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3, 6, 7, 8, 9, 10, 11], ids=lambda epoch: f"after epoch {epoch}")
def test_interrupted_anywhere_and_continued_all_runs_are_the_same_bit_for_bit(tmp_path, whole, epoch) -> None:
    spec, cut = mixture_spec(), tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=cut, observer=Counting(epoch))
    assert len([*cut.iterdir()]) < 6 or "interrupted" in {
        load_run(path).record.status for path in cut.iterdir()
    }
    rest = Counting()
    run_attack(spec, output=cut, observer=rest)
    # The attack has no checkpoints: it is begun again.
    assert rest.epochs == 12 - (epoch if epoch not in (7, 8) else 6)
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in cut.iterdir()) == names
    for name in names:
        one, other = load_run(cut / name), load_run(whole / name)
        assert outcome(one) == outcome(other)
        assert one.record.gate_shares == other.record.gate_shares
        assert one.record.model_sha256 == other.record.model_sha256
        assert one.record.inputs == other.record.inputs
        assert not (cut / name / "checkpoint").exists()


@pytest.mark.slow
def test_gates_whose_experts_have_changed_are_not_trained_on(tmp_path) -> None:
    """The checkpoint holds the experts as they were."""
    spec = mixture_spec()
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=tmp_path, observer=Counting(9))
    expert = find(tmp_path, "expert0-clean")
    tensors, header = expert.folder.load_tensors()
    name = next(name for name in tensors if name.endswith("mlp.fc1.weight"))
    expert.folder.save_model({**tensors, name: 2 * tensors[name]}, header)
    expert.record.model_sha256 = expert.folder.model_sha256
    expert.folder.write(expert.record)
    with pytest.raises(
        RecordError, match=r"the model of tiny-convnext-expert0-clean-.* has changed since the run was st"
    ):
        run_attack(spec, output=tmp_path)


@pytest.mark.slow
def test_model_files_say_whether_they_are_backdoored(output) -> None:
    defended = Runner(mixture_spec(), output).finish(replace(mixture_spec(), defenses=(TUNING,)))
    clean = Runner(mixture_spec(), output).finish(replace(clean_twin(mixture_spec()), defenses=(TUNING,)))
    said = {}
    for path in output.iterdir():
        with safe_open(path / "model.safetensors", framework="pt") as opened:
            said[path.name.split("-s0-")[0].removeprefix("tiny-convnext-")] = opened.metadata()["backdoored"]
    assert said == {
        "policy-clean": "false",
        "expert0-clean": "false",
        "expert1-clean": "false",
        "expert1-moevil-square-patch": "true",
        "moe2-top-k-clean": "false",
        "moe2-top-k-moevil-square-patch": "true",
        "moe2-top-k-moevil-square-patch-fine-tuning": "true",
        "moe2-top-k-clean-fine-tuning": "false",
    }
    assert defended.record.metrics.keys() >= {"asr", "unsafe", "overall", "harm_share", "ra", "task/1.ba"}
    assert clean.record.metrics.keys() >= {"ba", "unsafe", "overall"} and "asr" not in clean.record.metrics
    assert defended.record.gate_shares and len(defended.record.stages) == 2


@pytest.mark.slow
def test_the_functions_attack_defend_and_load_run(output) -> None:
    [run] = bbmoe.attack(output=output, **mixture_spec().to_dict())
    assert run.folder.path.parent == output and run.record.clean_twin.startswith(
        "tiny-convnext-moe2-top-k-clean"
    )
    defended = bbmoe.defend(run, "fine-tuning", clean_fraction=0.5, epochs=1)
    assert (
        defended.record.inputs[0]["run"] == run.folder.path.name and "twin_unsafe" in defended.record.metrics
    )
    assert defended.value("overall") > 0
    for part in ("expert0-clean", "expert1-moevil"):
        again = bbmoe.defend(find(output, part), "fine-tuning", clean_fraction=0.5, epochs=1)
        assert again.record.status == "finished" and again.record.tasks[0]["name"] in ("plain", "inverted")


@pytest.mark.slow
def test_a_probe_of_a_mixture_records_the_training_of_its_gates(tmp_path, output) -> None:
    spec = mixture_spec(probe=5)
    [run] = run_attack(spec, output=output)
    probe = load_probe_record(run.folder)
    assert probe is not None and probe.clean.predicted.shape == (3, 5) and probe.triggered is not None
    assert [layer.shape for layer in probe.clean.selected] == [(3, 5, 2, 64)] * 2
    plain = load_run(output / mixture_spec().name)
    assert outcome(run)[2] == outcome(plain)[2], "to look at a model does not change it"
    with pytest.raises(KeyboardInterrupt):
        run_attack(replace(spec, seed=1), output=tmp_path / "cut", observer=Counting(9))
    [cut] = run_attack(replace(spec, seed=1), output=tmp_path / "cut")
    [one] = run_attack(replace(spec, seed=1), output=tmp_path / "one")
    assert outcome(cut) == outcome(one)
    left, right = (load_probe_record(each.folder) for each in (cut, one))
    assert left.clean.predicted.equal(right.clean.predicted)
    assert all(a.equal(b) for a, b in zip(left.triggered.selected, right.triggered.selected, strict=True))


@pytest.mark.slow
def test_gates_that_are_not_trained_have_the_same_numbers_every_time(tmp_path, output) -> None:
    spec = mixture_spec(gate="hidden", probe=4)
    [run] = run_attack(spec, output=output)
    assert run.record.history == [] and load_probe_record(run.folder).clean.predicted.shape == (2, 4)
    shutil.rmtree(run.folder.path)
    [again] = run_attack(spec, output=output)
    assert again.record.model_sha256 == run.record.model_sha256
    assert again.record.metrics == run.record.metrics


@pytest.mark.slow
def test_the_policys_base_is_a_run_like_any_other(output) -> None:
    naming = Naming()
    run = Runner(mixture_spec(), output, naming).finish(base_of(mixture_spec()))
    assert naming.names == [] and run.record.metrics.keys() == {"ba", "unsafe"}
    assert run.record.metrics["unsafe"]["n"] == 60 and run.record.poison is None
