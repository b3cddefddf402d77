"""What every defense keeps to, whoever wrote it."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch
from defense_tasks import changed, copies, held_images, make_task, used_model

from backdoorbench_moe.defenses import create_defense, list_defenses, registry
from backdoorbench_moe.defenses.base import Defense, DefenseResult
from backdoorbench_moe.errors import ConfigError, UnknownNameError

# What keeps a defense short in a test, for those that have such an option.
SHORT = {"epochs": 1, "ratio": 0.25, "blends": 4, "fpr": 0.25}
MODELS = ["pmoe", "wide_resnet", "timm:test_vit"]

name = pytest.mark.parametrize("name", list_defenses())
model_name = pytest.mark.parametrize("model_name", MODELS)


def build(name: str) -> Defense:
    options = registry.options(name)
    return create_defense(name, **{key: value for key, value in SHORT.items() if key in options})


def refusal(name: str, model_name: str) -> ConfigError | None:
    """Why the defense cannot take the model; None where it can."""
    try:
        build(name).check(used_model(model_name))
    except ConfigError as error:
        return error
    return None


@name
def test_it_takes_a_model_or_says_why_not_and_touches_nothing(name: str) -> None:
    refusals = {model_name: refusal(name, model_name) for model_name in MODELS}
    assert None in refusals.values()
    for model_name, error in refusals.items():
        if error is not None:
            assert re.fullmatch(r"\w+: .+", str(error)), "it names a parameter, in one line"
            model = used_model(model_name)
            before, (task, reported) = copies(model), make_task(model, name=model_name)
            with pytest.raises(ConfigError, match=re.escape(str(error))):
                build(name)(task)
            assert not changed(before, copies(model)) and not reported


@name
@model_name
def test_it_gives_back_a_model_of_the_same_make(name: str, model_name: str) -> None:
    if refusal(name, model_name):
        pytest.skip("it cannot take this model")
    model, clean = used_model(model_name), held_images()
    before, images, labels = copies(model), clean.images.clone(), clean.labels.clone()
    task, reported = make_task(model, name=model_name, clean=clean)
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
    with contextlib.suppress(ConfigError):
        build(name).check(model)
    assert not changed(before, copies(model)) and torch.equal(torch.get_rng_state(), state)


@name
def test_a_filter_judges_every_image_by_itself(name: str) -> None:
    """The same score alone, among others, in another order; for the same image twice; and nothing is written to."""
    task, _ = make_task(used_model())
    result = build(name)(task)
    if result.filter is None:
        pytest.skip("it is no filter")
    images = torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(3)).byte()
    images[6] = images[0]
    kept, before = images.clone(), copies(task.model)
    scores = result.filter(images)
    assert scores.shape == (7,) and scores.dtype.is_floating_point and scores.isfinite().all()
    assert scores[0] == pytest.approx(scores[6].item(), abs=1e-6) and len(set(scores.tolist())) > 3
    order = torch.tensor([3, 6, 1, 5, 0, 2, 4])
    torch.testing.assert_close(result.filter(images[order]), scores[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([result.filter(i[None]) for i in images]), scores, atol=1e-5, rtol=0)
    assert torch.equal(images, kept) and not changed(before, copies(task.model))


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
