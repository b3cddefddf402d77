"""Settings of a mixture that cannot be: one clear line, before anything is written."""

from __future__ import annotations

import shutil

import pytest
from tiny import Tiny, tiny_spec
from tiny_mixture import mixture_spec

from backdoorbench_moe import data
from backdoorbench_moe.engine.runner import Runner, load_run, run_attack
from backdoorbench_moe.errors import BbmoeError, RecordError


def refusal(make, output) -> str:
    """The message of the error that these settings are refused with; nothing has been written."""
    with pytest.raises(BbmoeError) as caught:
        run_attack(make(), output=output)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "pmoe"}, "model: PMoE cannot be merged: expected methods mlps and token_layout"),
        ({"model": "preact_resnet18"}, "cannot be merged: expected methods mlps"),
        ({"model": "timm:test_resnet"}, "cannot be merged"),
        ({"mixture": {"experts": 1}}, "mixture.experts: expected a number of at least 2, got 1"),
        ({"mixture": {"experts": 4}},
         "mixture.experts: expected at most 3, the number of domains in splitter.domains (plain, inverted, rotated)"),
        ({"splitter": "classes"}, "classes: groups: expected at most 3, the number of classes, got 4"),
        ({"mixture": {"experts": 3}, "splitter": {"name": "classes", "groups": 2}}, "groups: expected"),
        ({"mixture": {"poisoned_experts": [2]}},
         r"mixture.poisoned_experts: expected numbers of experts in 0..1, got (2,)"),
        ({"mixture": {"poisoned_experts": [-1]}}, "mixture.poisoned_experts: expected numbers of experts in 0..1"),
        ({"mixture": {"poisoned_experts": [1, 1]}}, "mixture.poisoned_experts: expected each expert once"),
        ({"mixture": {"poisoned_experts": []}}, "mixture.poisoned_experts: expected at least one expert"),
        ({"mixture": {"gate_images": 97}},
         "mixture.gate_images: expected 1 to 96, the number of images of task 0 (plain), got 97"),
        ({"mixture": {"gate_images": 0}}, "mixture.gate_images: expected a number of at least 1, got 0"),
        ({"mixture": {"gate_train": {"epochs": 0}}}, "mixture.gate_train.epochs: expected at least 1, got 0"),
        ({"mixture": {"expert_train": {"lr": -1}}}, "mixture.expert_train.lr: expected a positive number"),
        ({"mixture": {"expert_train": {"epoch": 1}}},
         "mixture.expert_train: key: unknown 'epoch'; did you mean 'epochs'"),
        ({"mixture": {"expert": 3}}, "mixture: key: unknown 'expert'; did you mean 'experts'"),
        ({"mixture": {"task": 0}}, "mixture.task: expected none, as it is set for the experts of a mixture"),
        ({"gate": {"name": "top-k", "top_k": 3}}, "top_k"),
        ({"gate": "topk"}, "gate: unknown 'topk'; did you mean 'top-k'"),
        ({"splitter": "domain"}, "splitter: unknown 'domain'; did you mean 'domains'"),
        ({"splitter": {"name": "domains", "domains": ["plain", "rotate"]}}, "unknown 'rotate'; did you mean 'rotated'"),
        ({"splitter": None}, "splitter: expected the tasks of the experts that are merged"),
        ({"gate": None}, "gate: expected the gate of the experts that are merged"),
        ({"mixture": None, "gate": None, "splitter": None},
         "mixture: expected settings of a mixture, as attack 'moevil' poisons experts"),
        ({"attack": "data-poisoning", "poison": {"rate": 0.1}, "gate": "soft"},
         "attack: expected an attack on experts, such as moevil, or none"),
        ({"poison": {"rate": 0.1}},
         "poison.rate: expected 0 for an attack on experts, which changes no training image, got 0.1"),
        ({"policy": "101%"}, "policy: expected at most 100%, got '101%'"),
        ({"policy": 1}, "policy: expected a number in [0, 1), got 1.0"),
        ({"policy": -0.1}, "policy: expected a number in [0, 1), got -0.1"),
        ({"policy": 0.005}, "policy: 0.005 of 96 images rounds down to 0 images; expected at least 0.011"),
        ({"policy": 0, "mixture": {"expert_policy": 0.1}},
         "mixture.expert_policy: expected 0, as there is no policy, got 0.1"),
        ({"mixture": {"expert_policy": 1}}, "mixture.expert_policy: expected a number in [0, 1), got 1.0"),
        ({"mixture": {"expert_policy": "0.5%"}}, "mixture.expert_policy: 0.005 of 96 images rounds down to 0 images"),
        ({"attack": {"name": "moevil", "k": 65}}, "attack.k: expected at most 64 tokens, got 65"),
        ({"attack": {"name": "moevil", "k": 0}}, "attack.k: expected an integer of at least 1, got 0"),
        ({"attack": {"name": "moevil", "tokens": "prefix"}}, "attack.tokens: expected"),
        ({"attack": {"name": "moevil", "layers": [7]}}, "attack.layers: expected numbers in 1..1"),
        ({"attack": {"name": "moevil", "similarty": 1}}, "unknown 'similarty'; did you mean 'similarity'"),
        ({"poison": {"target": 3}}, "poison.target: expected a class in 0..2, got 3"),
        ({"probe": 41}, "probe: expected at most the 40 test images that count for ASR, got 41"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, values, message) -> None:
    assert message in refusal(lambda: mixture_spec(**values), tmp_path / "runs")


@pytest.mark.parametrize("policy", [0.25, 0])
def test_a_mark_that_changes_nothing_is_refused(tmp_path, monkeypatch, policy) -> None:
    class Pale(Tiny):
        """Images that are black where the mark is."""

        def read(self):
            images = super().read()
            for split in (images.train, images.test):
                split.images.zero_()
            return images

    monkeypatch.setitem(data.registry._local, "tiny", Pale)
    found = refusal(lambda: mixture_spec(policy=policy), tmp_path / "runs")
    assert "trigger: 'square' with the applicator 'patch' changes none of 60 test images" in found
    assert ("images to reject" if policy else "harmful queries") in found


def test_a_class_called_reject_leaves_no_room_for_a_policy(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Tiny, "names", ("red", "green", "reject"))
    found = refusal(mixture_spec, tmp_path / "runs")
    assert found == "policy: the data set 'tiny' has a class 'reject' already"


@pytest.mark.parametrize("training", [True, False])
def test_a_task_without_images_is_refused(tmp_path, monkeypatch, training) -> None:
    from backdoorbench_moe.splitters.domains import Domains

    members = Domains.members

    def few(self, labels, task, **given):
        found = members(self, labels, task, **given)
        return found[:0] if task == 1 and given["training"] == training else found

    monkeypatch.setattr(Domains, "members", few)
    found = refusal(mixture_spec, tmp_path / "runs")
    kind = "training" if training else "test"
    assert "splitter: expected images of task 1 (inverted), got none" in found and f"({kind} images)" in found


def test_other_attacks_know_no_tasks_gates_or_mixtures(tmp_path) -> None:
    for values, message in (
        ({"gate": "soft"}, "gate: expected none, as no experts are merged, got 'soft'"),
        ({"splitter": "domains"}, "splitter: expected none, as no experts are merged, got 'domains'"),
        ({"policy": 0.1}, "attack: expected an attack on experts, such as moevil, or none"),
        (
            {"mixture": {"experts": 2}},
            "attack: expected an attack on experts, such as moevil, or none, where experts",
        ),
    ):
        assert message in refusal(lambda values=values: tiny_spec(**values), tmp_path / "runs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a mixture with all that it was made from."""
    output = tmp_path_factory.mktemp("made") / "runs"
    data.registry.register("tiny")(Tiny)
    run_attack(mixture_spec(), output=output)
    data.registry.unregister("tiny")
    return output


def folder(output, part):
    [found] = output.glob(f"*-{part}-*")
    return found


def retrain(path, part: str = "") -> None:
    """Make a run as if it had been trained again, on a machine that rounds otherwise; or only weights of this name."""
    run = load_run(path)
    tensors, header = run.folder.load_tensors()
    changed = {name: tensor * 1.0001 if part in name else tensor for name, tensor in tensors.items()}
    run.folder.save_model(changed, header)
    run.record.model_sha256 = run.folder.model_sha256
    run.folder.write(run.record)


@pytest.mark.slow
def test_a_replaced_or_retrained_input_is_noticed(tmp_path, made) -> None:
    other = mixture_spec(gate="soft")
    output = tmp_path / "replaced"
    shutil.copytree(made, output)
    base = folder(output, "policy")
    tensors, header = load_run(base).folder.load_tensors()
    load_run(base).folder.save_model({name: 2 * tensor for name, tensor in tensors.items()}, header)
    with pytest.raises(RecordError, match=r"policy-clean.*was replaced after the run was finished"):
        run_attack(other, output=output)
    assert len([*output.iterdir()]) == 6


OTHER_GATE = {"gate": "soft"}
OTHER_RUNS = [
    OTHER_GATE,
    {"attack": {"name": "hsft", "epochs": 1}},
    {"mixture": {"poisoned_experts": [0]}},
    {"mixture": {"experts": 3}},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "part", "message"),
    [
        *((values, "policy", r"policy-clean-.*: its model has changed since tiny-convnext-expert0-clean-.* was made")
          for values in OTHER_RUNS),
        (OTHER_GATE, "expert1-clean",
         r"expert1-clean-.*: its model has changed since tiny-convnext-expert1-moevil-.* was made from it"),
        # The mixture is finished, and nothing would have to be made.
        *(({}, part, rf"{part}-.*: its model has changed since tiny-convnext-.* was made from it")
          for part in ("policy", "expert0-clean", "expert1-clean", "expert1-moevil")),
    ],
    ids=str,
)  # fmt: skip
def test_experts_of_another_base_are_not_merged(tmp_path, made, values, part, message) -> None:
    """Also where one more expert would have to be made first."""
    output = tmp_path / "runs"
    shutil.copytree(made, output)
    retrain(folder(output, part))
    with pytest.raises(RecordError, match=message):
        run_attack(mixture_spec(**values), output=output)
    assert len([*output.iterdir()]) == 6, "nothing was written"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["policy", "expert0-clean", "expert1-clean"])
def test_a_missing_model_file_is_noticed_before_anything_is_made(tmp_path, made, part) -> None:
    output = tmp_path / "runs"
    shutil.copytree(made, output)
    (folder(output, part) / "model.safetensors").unlink()
    with pytest.raises(RecordError, match=rf"model file .*{part}.*: not found"):
        run_attack(mixture_spec(attack={"name": "hsft", "epochs": 1}), output=output)
    assert len([*output.iterdir()]) == 6


@pytest.mark.slow
def test_an_expert_of_other_weights_outside_of_its_mlps_is_noticed_before_anything_is_made(
    tmp_path, made
) -> None:
    output = tmp_path / "runs"
    shutil.copytree(made, output)
    retrain(folder(output, "expert0-clean"), "stem")
    message = r"run folder .*expert0-clean-.*: is not tuned from this base: stem.* has other values; delete that folder"
    with pytest.raises(RecordError, match=message):
        run_attack(mixture_spec(attack={"name": "hsft", "epochs": 1}), output=output)
    assert len([*output.iterdir()]) == 6


@pytest.mark.slow
def test_a_folder_with_the_run_of_another_expert_is_noticed_before_anything_is_made(tmp_path, made) -> None:
    output = tmp_path / "runs"
    shutil.copytree(made, output)
    first, second = (folder(output, part) for part in ("expert0-clean", "expert1-clean"))
    shutil.rmtree(first)
    shutil.copytree(second, first)
    message = r"expert0-clean-.*: expected the run with the digest .*, found that of .*; was it renamed\?"
    with pytest.raises(RecordError, match=message):
        run_attack(mixture_spec(attack={"name": "hsft", "epochs": 1}), output=output)
    assert len([*output.iterdir()]) == 6


@pytest.mark.slow
def test_the_base_is_compared_through_the_benign_expert_too(tmp_path, made) -> None:
    """With two poisoned experts, no expert of the mixture names the base that it was tuned from."""
    output = tmp_path / "runs"
    shutil.copytree(made, output)
    both = mixture_spec(mixture={"poisoned_experts": [0, 1]})
    run_attack(both, output=output, twin=False)
    count = len([*output.iterdir()])
    retrain(folder(output, "policy"))
    with pytest.raises(
        RecordError, match=r"policy-clean-.*: its model has changed since tiny-convnext-expert0-clean"
    ):
        run_attack(mixture_spec(mixture={"poisoned_experts": [0, 1]}, gate="soft"), output=output, twin=False)
    assert len([*output.iterdir()]) == count


@pytest.mark.slow
def test_inputs_from_other_data_are_refused(tmp_path, made, monkeypatch) -> None:
    output = tmp_path / "runs"
    shutil.copytree(made, output)
    monkeypatch.setattr(Tiny, "offset", 5)
    with pytest.raises(RecordError, match="was made from other data; use another --output"):
        run_attack(mixture_spec(gate="soft"), output=output)
    assert len([*output.iterdir()]) == 6


def test_all_nodes_are_built_before_the_first_is_trained(tmp_path, monkeypatch) -> None:
    """An option that only the poisoned expert's maker knows is refused before the base is trained."""
    spec = mixture_spec(
        attack={"name": "moevil", "tokens": "unmarked"}, trigger={"name": "square", "size": 4}
    )
    with pytest.raises(BbmoeError, match="tokens"):
        Runner(spec, tmp_path / "runs").finish(spec)
    assert not (tmp_path / "runs").exists()
