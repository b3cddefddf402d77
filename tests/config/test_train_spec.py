"""Settings of the training that came after the first digests: checked, and left out where they have their defaults."""

from __future__ import annotations

import pytest

from backdoorbench_moe.config import TrainSpec, build_spec, chain_settings, spec_from_dict
from backdoorbench_moe.config.train import LEFT_OUT_AT_DEFAULT
from backdoorbench_moe.errors import ConfigError, UnknownNameError

CHANGED = {
    "augment": "crop-flip",
    "milestones": (0.3, 0.6),
    "gamma": 0.5,
    "label_smoothing": 0.1,
    "clip_grad": 1.0,
    "freeze": ("stem.*",),
    "accumulate": 2,
}


def test_settings_at_their_defaults_are_not_written() -> None:
    assert not TrainSpec().to_dict().keys() & set(LEFT_OUT_AT_DEFAULT)
    assert (
        build_spec({"train": {"augment": "none", "milestones": [0.5, 0.75]}}).digest == build_spec({}).digest
    )


@pytest.mark.parametrize("where", ["train", "expert_train", "gate_train"])
@pytest.mark.parametrize("name", LEFT_OUT_AT_DEFAULT)
def test_a_changed_setting_is_written_and_read_again(name, where) -> None:
    if name == "freeze" and where != "train":
        pytest.skip("experts and gates cannot be frozen by name")
    values = {name: CHANGED[name]}
    layer = {"train": values} if where == "train" else {"attack": "moevil", "mixture": {where: values}}
    plain = build_spec({**layer, "train": {}} if where == "train" else {"attack": "moevil"})
    spec = build_spec(layer)
    assert spec.digest != plain.digest
    assert spec_from_dict(spec.to_dict()) == spec
    written = spec.to_dict()["train"] if where == "train" else spec.to_dict()["mixture"][where]
    assert written.keys() & set(LEFT_OUT_AT_DEFAULT) == {name}


@pytest.mark.parametrize("where", ["expert_train", "gate_train"])
def test_experts_and_gates_cannot_be_frozen_by_name(where) -> None:
    with pytest.raises(ConfigError, match=rf"mixture\.{where}\.freeze: expected none"):
        build_spec({"attack": "moevil", "mixture": {where: {"freeze": ["a"]}}})


def test_experts_and_gates_do_not_inherit_the_augmentation_of_the_base() -> None:
    spec = build_spec({"attack": "moevil", "train": {"augment": "crop"}})
    assert spec.mixture is not None
    assert spec.train.augmentations == ("crop",)
    assert spec.mixture.expert_train.augmentations == spec.mixture.gate_train.augmentations == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"milestones": []}, r"train\.milestones: expected ascending shares.*0\.6 is epoch 60 of 100"),
        ({"milestones": [30, 60]}, r"train\.milestones: expected ascending shares"),
        ({"milestones": [0.6, 0.3]}, r"train\.milestones: expected ascending shares"),
        ({"milestones": [0.0, 0.3]}, r"train\.milestones: expected ascending shares"),
        ({"gamma": 0}, r"train\.gamma: expected a number in \(0, 1\]"),
        ({"label_smoothing": 1}, r"train\.label_smoothing: expected a number in \[0, 1\)"),
        ({"clip_grad": 0}, r"train\.clip_grad: expected a positive number or none"),
        ({"augment": "crop-crop"}, r"train\.augment: expected each step once, got 'crop-crop'"),
        ({"augment": True}, r"train\.augment: expected a string"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_spec({"train": values})


@pytest.mark.parametrize("augment", ["crop-flop", "none-crop", "", "crop-"])
def test_an_unknown_step_is_refused_by_name(augment) -> None:
    with pytest.raises(UnknownNameError, match=r"train\.augment: step"):
        TrainSpec(augment=augment)


def test_near_names_are_suggested() -> None:
    with pytest.raises(ConfigError, match=r"mixture\.expert_train\.augment: step.*did you mean .colour"):
        build_spec(chain_settings(["attack=moevil", "mixture.expert_train.augment=crop-color"]))
