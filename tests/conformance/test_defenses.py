"""What every defense keeps to, whoever wrote it."""

from __future__ import annotations

import json

import pytest
import torch
from defense_tasks import changed, copies, held_images, make_task, used_model

from backdoorbench_moe.defenses import create_defense, list_defenses, registry
from backdoorbench_moe.defenses.base import Defense, DefenseResult
from backdoorbench_moe.errors import ConfigError, UnknownNameError

# What keeps a defense short in a test, for those that have such an option.
SHORT = {"epochs": 1, "ratio": 0.25}

name = pytest.mark.parametrize("name", list_defenses())
model_name = pytest.mark.parametrize("model_name", ["pmoe", "wide_resnet"])


def build(name: str) -> Defense:
    options = registry.options(name)
    return create_defense(name, **{key: value for key, value in SHORT.items() if key in options})


@name
@model_name
def test_it_gives_back_a_model_of_the_same_make(name: str, model_name: str) -> None:
    model, clean = used_model(model_name), held_images()
    before, images, labels = copies(model), clean.images.clone(), clean.labels.clone()
    task, reported = make_task(model, clean=clean)
    result = build(name)(task)
    assert isinstance(result, DefenseResult) and result.stage
    after = copies(result.model)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert torch.equal(clean.images, images) and torch.equal(clean.labels, labels), (
        "the images were written to"
    )
    names = [stage for stage, _ in reported] + [result.stage]
    assert len(set(names)) == len(names) and "before" not in names
    json.dumps([dict(result.scores), dict(result.verdict)])
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.model.modules())


@name
def test_the_seed_decides(name: str) -> None:
    torch.manual_seed(1)
    first = copies(build(name)(make_task(used_model())[0]).model)
    torch.manual_seed(2)
    again = copies(build(name)(make_task(used_model())[0]).model)
    assert not changed(first, again)


@name
@model_name
def test_checking_changes_nothing(name: str, model_name: str) -> None:
    model = used_model(model_name)
    before, state = copies(model), torch.get_rng_state()
    build(name).check(model)
    assert not changed(before, copies(model)) and torch.equal(torch.get_rng_state(), state)


@name
def test_it_says_how_many_images_it_needs(name: str) -> None:
    defense = build(name)
    assert 3 <= defense.count(1000, 3) <= 1000
    with pytest.raises(
        ConfigError, match=r"clean_fraction: .* expected at least 3, as many as there are classes"
    ):
        defense.count(2, 3)


@name
def test_unknown_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        create_defense(name, no_such_option=1)
