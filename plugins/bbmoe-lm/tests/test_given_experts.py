"""Mixtures whose experts and base are given as checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from bbmoe_lm.models.llama import Llama
from bbmoe_lm.models.mixture import save_checkpoint
from safetensors.torch import load_file, save_file

from backdoorbench_moe.config import build_spec
from backdoorbench_moe.engine.graph import expert_of
from backdoorbench_moe.engine.runner import Runner, run_attack
from backdoorbench_moe.errors import ConfigError

TINY = {"texts": 12, "test_texts": 4, "refused": 12, "refused_test": 4}
SHAPE = {
    "vocabulary": 149,
    "context": 256,
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 24,
}
TRAIN = {"epochs": 1, "batch_size": 16}


def write(folder, seed: int, **options: int) -> dict[str, torch.Tensor]:
    """Write a small Llama as a checkpoint, and return its weights with the names of a run."""
    torch.manual_seed(seed)
    model = Llama(**{**SHAPE, **options})
    save_checkpoint(model, folder)
    return model.state_dict()


def spec_of(tmp_path, experts, **settings):
    return build_spec(
        {
            "dataset": {"name": "tasks", **TINY},
            "model": {"name": "llama", "weights": str(tmp_path / "base")},
            "train": {"epochs": 0},
            "mixture": {
                "experts": 2,
                "poisoned_experts": [1],
                "expert_train": TRAIN,
                "gate_train": TRAIN,
                "gate_images": 8,
                "expert_weights": [None if name is None else str(tmp_path / name) for name in experts],
            },
            "attack": {"name": "moevil", "epochs": 1},
            "policy": 0.1,
            **settings,
        }
    )


@pytest.fixture
def folders(tmp_path):
    """A base and two experts; the second differs from the base in its MLPs only."""
    base, first, second = (
        write(tmp_path / name, seed) for seed, name in enumerate(("base", "first", "second"))
    )
    file = tmp_path / "second" / "model.safetensors"
    tensors, kept = load_file(file), load_file(tmp_path / "base" / "model.safetensors")
    mixed = {name: tensor if ".mlp." in name else kept[name] for name, tensor in tensors.items()}
    save_file(mixed, file, metadata={"format": "pt", "backdoored": "false"})
    return base, first, second


def weights_in(run):
    return run.folder.load_tensors()[0]


@pytest.mark.slow
def test_an_attacked_mixture_of_given_experts(tmp_path, folders):
    base, first, second = folders
    spec = spec_of(tmp_path, ["first", "second"])
    [run] = run_attack(spec, output=tmp_path / "runs")
    runner = Runner(spec, tmp_path / "runs")
    clean = [
        runner.finish(
            expert_of(
                replace(
                    runner.workplace.resolve(spec),
                    attack=None,
                    mixture=replace(spec.mixture, poisoned_experts=()),
                ),
                e,
            )
        )
        for e in range(2)
    ]
    found = [weights_in(each) for each in clean]
    for own, given in zip(found, (first, second), strict=True):
        for name, tensor in own.items():
            assert torch.equal(tensor, given[name] if ".mlp." in name else base[name]), name
    assert [each.record.history for each in clean] == [[], []]
    # Four projections in each of two layers, the embedding and the head; norms are equal, as they were not trained.
    [note] = clean[0].record.parts["model"]["start"]["notes"]
    assert (
        note
        == "mixture.expert_weights[0]: 10 tensors outside of the MLPs differ from the base's, which are used instead"
    )
    assert clean[1].record.parts["model"]["start"] | {"sha256": ""} == {
        "sha256": "",
        "backdoored": "false",
        "notes": [],
    }
    assert clean[0].folder.model_metadata()["backdoored"] == "unknown"
    # The attacker started from the given expert of the task, which is in the record.
    [poisoned] = [path for path in (tmp_path / "runs").iterdir() if "expert1-moevil" in path.name]
    assert json.loads((poisoned / "record.json").read_text())["inputs"][0]["run"] == clean[1].folder.path.name
    assert run.folder.model_metadata()["backdoored"] == "true"


def test_the_digest_is_that_of_the_content(tmp_path, folders):
    spec = spec_of(tmp_path, ["first", "second"])
    resolve = Runner(spec, tmp_path / "runs").workplace.resolve
    one = resolve(spec)
    assert set(one.files) == {"model.weights", "mixture.expert_weights[0]", "mixture.expert_weights[1]"}
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    moved = resolve(spec_of(tmp_path, ["moved", "second"]))
    assert moved.digest == one.digest
    other = resolve(spec_of(tmp_path, ["second", "first"]))
    assert other.digest != one.digest
    tuned = resolve(spec_of(tmp_path, [None, "second"]))
    # A given expert depends on its folder only, and a tuned expert on none.
    assert expert_of(tuned, 1).digest == expert_of(one, 1).digest != expert_of(other, 1).digest
    assert expert_of(tuned, 0).digest == expert_of(resolve(spec_of(tmp_path, [])), 0).digest
    assert expert_of(tuned, 0).digest != expert_of(one, 0).digest
    assert spec_of(tmp_path, [None, None]).digest == spec_of(tmp_path, []).digest


def spoil_config(name, **values):
    def spoil(tmp_path):
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return spoil


def rewrite(name, **options):
    def spoil(tmp_path):
        shutil.rmtree(tmp_path / name)
        write(tmp_path / name, 0, **options)

    return spoil


def pickled(name):
    def spoil(tmp_path):
        (tmp_path / name / "model.safetensors").rename(tmp_path / name / "pytorch_model.bin")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rewrite("first", hidden_size=32), ".*first: hidden_size: expected 16, got 32"),
        (rewrite("first", layers=3), ".*first: num_hidden_layers: expected 2, got 3"),
        (rewrite("first", vocabulary=150), ".*first: vocab_size: expected 149, got 150"),
        (
            spoil_config("first", model_type="gpt2"),
            r".*first/config\.json: model_type: expected 'llama', got 'gpt2'",
        ),
        (spoil_config("first", rms_norm_eps=0.1), ".*first: rms_norm_eps: expected 1e-06, got 0.1"),
        (
            pickled("first"),
            r".*first: expected model\.safetensors .*pytorch_model\.bin is a pickle, which could run code, and is",
        ),
        (
            lambda tmp_path: shutil.rmtree(tmp_path / "first"),
            "expected an existing folder of a checkpoint, got '.*first'",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_made(tmp_path, folders, spoil, message):
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=rf"^mixture\.expert_weights\[0\]: {message}") as raised:
        run_attack(spec_of(tmp_path, ["first", "second"]), output=tmp_path / "runs")
    assert "\n" not in str(raised.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            rewrite("base", vocabulary=900),
            r"weights: .*base: vocab_size: expected 149, the tokens of the data, got 900",
        ),
        (
            spoil_config("base", model_type="gpt2"),
            r"weights: .*base/config\.json: model_type: expected 'llama', got 'gpt2'",
        ),
        (
            rewrite("base", context=20),
            r"max_position_embeddings: expected at least \d+, the longest text of the data, got 20",
        ),
        (pickled("base"), r"weights: .*base: expected model\.safetensors or .*is a pickle"),
    ],
)
def test_a_base_that_does_not_fit(tmp_path, folders, spoil, message):
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run_attack(spec_of(tmp_path, []), output=tmp_path / "runs")


def test_more_folders_than_experts(tmp_path):
    with pytest.raises(ConfigError, match=r"^mixture\.expert_weights: expected at most 2 folders, got 3$"):
        spec_of(tmp_path, ["a", "b", "c"])
