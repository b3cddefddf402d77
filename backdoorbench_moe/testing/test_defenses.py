"""Conformance tests of defenses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe import defenses
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.engine.measuring.samples import measure_samples
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.testing import making
from backdoorbench_moe.testing.making import (
    changed,
    coloured_split,
    copies,
    global_settings,
    hooked,
    used_model,
)
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task
from backdoorbench_moe.testing.texts import build_text_mixture, make_text_task, text_split

# Names for small mixtures of merged experts, used like names of models: one for images and one for texts.
MIXTURE, TEXT_MIXTURE = "a mixture", "a mixture of language models"


def build(name: str) -> Defense:
    return making.make("defense", name)


def make_task(
    defense: Defense, model: nn.Module, model_name: str, **given: Any
) -> tuple[DefenseTask, list[Any]]:
    """Create a task that grants exactly what the defense declares."""
    if model_name == MIXTURE:
        return make_mixture_task(model, needs=defense.needs, **given)
    if model_name == TEXT_MIXTURE:
        return make_text_task(model, needs=defense.needs, **given)
    made_by = PartSpec(model_name, making.tiny_options("model", model_name))
    return making.make_task(model, made_by, needs=defense.needs, **given)


def model_called(name: str) -> nn.Module:
    """Build a small model by its name, or a mixture."""
    mixtures = {MIXTURE: build_mixture, TEXT_MIXTURE: build_text_mixture}
    return mixtures[name]() if name in mixtures else used_model(name)


def refusal(name: str, model_name: str) -> ConfigError | None:
    """Return why the defense cannot be applied to the model; None if it can."""
    try:
        build(name).check_model(model_called(model_name))
    except ConfigError as error:
        return error
    return None


@pytest.fixture
def accepted(defense_name: str, partner_models: list[str]) -> str:
    """Return the first model to which the defense can be applied."""
    models = [*partner_models, MIXTURE, TEXT_MIXTURE]
    found = next((model for model in models if refusal(defense_name, model) is None), None)
    assert found, f"it cannot be applied to any of {', '.join(models)}"
    return found


def test_a_model_is_refused_in_one_line_or_defended(defense_name: str, model_name: str) -> None:
    error = refusal(defense_name, model_name)
    if error is None:
        assert_defended(defense_name, model_name)
    else:
        assert_refused(defense_name, model_name, error)


def test_a_mixture_is_refused_in_one_line_or_defended(defense_name: str) -> None:
    test_a_model_is_refused_in_one_line_or_defended(defense_name, MIXTURE)


def test_a_mixture_of_language_models_is_refused_in_one_line_or_defended(defense_name: str) -> None:
    """Defenses that do not declare support for texts refuse a mixture of language models."""
    if not build(defense_name).takes_texts:
        assert "is for images" in str(refusal(defense_name, TEXT_MIXTURE))
    test_a_model_is_refused_in_one_line_or_defended(defense_name, TEXT_MIXTURE)


def assert_refused(defense_name: str, model_name: str, error: ConfigError) -> None:
    """Assert that the error is one line that names a parameter, and that a call raises it and changes nothing."""
    assert re.fullmatch(r"\w+: .+", str(error))
    defense, model = build(defense_name), model_called(model_name)
    before, (task, reported) = copies(model), make_task(defense, model, model_name)
    with pytest.raises(ConfigError, match=re.escape(str(error))):
        defense(task)
    assert not changed(before, copies(model)) and not reported


def splits_of(task: DefenseTask) -> Iterator[tuple[str, Split]]:
    """Yield the images, or texts, that a task grants, with the name in `needs`."""
    for need, given in task.granted.items():
        for each in given if isinstance(given, list) else [given]:
            if isinstance(each, Split):
                yield need, each


def assert_defended(defense_name: str, model_name: str) -> None:
    """Assert that a defense returns a finite model of the same architecture without hooks, and keeps the images.

    The run folder contains only the state of the model. A model that loads it must give the same logits.
    """
    defense, model = build(defense_name), model_called(model_name)
    clean = text_split(24, 1) if model_name == TEXT_MIXTURE else coloured_split(24, 1)
    before = copies(model)
    task, reported = make_task(defense, model, model_name, clean=clean)
    steps: list[tuple[int, int]] = []
    task = replace(task, progress=lambda done, total: steps.append((done, total)))
    granted = list(splits_of(task))
    kept = [(split.images.clone(), split.labels.clone()) for _, split in granted]
    settings = global_settings()
    result = defense(task)
    assert global_settings() == settings, "a global setting of torch was changed"
    assert isinstance(result, DefenseResult) and result.stage
    after = copies(result.model)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert all(tensor.isfinite().all() for tensor in after.values())
    for (need, split), (images, labels) in zip(granted, kept, strict=True):
        same = torch.equal(split.images, images) and torch.equal(split.labels, labels)
        assert same, f"the images or labels of {need!r} were written to"
    assert steps == sorted(steps) and all(0 <= done <= total for done, total in steps), f"progress: {steps}"
    names = [stage for stage, _ in reported] + [result.stage]
    assert len(set(names)) == len(names) and "before" not in names
    for judgement in result.judgements:
        scores = judgement.scores
        values = torch.tensor(list(scores.values())) if isinstance(scores, Mapping) else scores
        assert not isinstance(values, Tensor) or values.isfinite().all(), f"scores of {judgement.about}"
    if "training-set" in defense.needs:
        # Wrong numbers of scores and indices out of range raise a PluginError.
        measure_samples(result.judgements, [{} for _ in result.judgements], None, len(task.training_set))
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert not (left := hooked(result.model)), f"hooks are left on {left}"
    loaded = model_called(model_name)
    loaded.load_state_dict(after)
    found, expected = (task.logits(each, clean.images[:4]) for each in (result.model, loaded))
    told = "a model that loads the state of the defended one gives other logits"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=told)


def test_the_seed_decides(defense_name: str, accepted: str) -> None:
    defended = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        defense = build(defense_name)
        defended.append(copies(defense(make_task(defense, model_called(accepted), accepted)[0]).model))
    assert not changed(*defended)


def test_checking_changes_nothing(defense_name: str, model_name: str) -> None:
    model = model_called(model_name)
    before, state = copies(model), torch.get_rng_state()
    with contextlib.suppress(ConfigError):
        build(defense_name).check_model(model)
    assert not changed(before, copies(model)) and torch.equal(torch.get_rng_state(), state)


def test_a_filter_judges_every_image_by_itself(defense_name: str, accepted: str) -> None:
    """The score of an image is the same alone, in a batch and in another order. Inputs are not modified."""
    defense = build(defense_name)
    task, _ = make_task(defense, model_called(accepted), accepted)
    result = defense(task)
    if result.filter is None or result.filter.judge is None:
        pytest.skip("not a filter")
    images = torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(3)).byte()
    images[6] = images[0]
    images[4], images[5] = 0, 255  # Scores of uniform images must be finite, too.
    kept, before = images.clone(), copies(task.model)
    judge = result.filter.judge
    scores = judge(images)
    assert scores.shape == (7,) and scores.dtype.is_floating_point
    assert scores.isfinite().all(), "the score of an image is not finite"
    assert scores[0] == pytest.approx(scores[6].item(), abs=1e-6) and len(set(scores.tolist())) > 3
    order = torch.tensor([3, 6, 1, 5, 0, 2, 4])
    torch.testing.assert_close(judge(images[order]), scores[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([judge(i[None]) for i in images]), scores, atol=1e-5, rtol=0)
    assert torch.equal(images, kept) and not changed(before, copies(task.model))


def test_number_of_clean_images(defense_name: str) -> None:
    """A defense that needs clean or marked images gets at least one for each class; any other gets none."""
    defense = build(defense_name)
    if not {"clean", "marked", "tasks"} & defense.needs:
        assert defense.count(1000, 3) == 0
        # One that trains on parts of the training set may refuse so few images.
        with contextlib.suppress(ConfigError):
            assert defense.count(2, 3) == 0
        return
    assert 3 <= defense.count(1000, 3) <= 1000
    with pytest.raises(
        ConfigError, match=r"clean_fraction: .* expected at least 3, as many as there are classes"
    ):
        defense.count(2, 3)


def test_number_of_clean_texts(defense_name: str) -> None:
    """A defense that needs clean or refused texts gets at least one; any other gets none."""
    defense = build(defense_name)
    if not defense.takes_texts or not {"clean", "marked", "tasks"} & defense.needs:
        pytest.skip("is given no texts")
    assert 1 <= defense.count(1000, 0) <= 1000
    with pytest.raises(ConfigError, match=r"clean_fraction: .* texts is 0; expected at least 1"):
        defense.count(0, 0)


def test_the_option_for_the_length_of_its_tuning_is_one(defense_name: str) -> None:
    length = defenses.registry.lookup(defense_name).tuning_length
    if length is not None:
        default = defenses.registry.options(defense_name)[length].default
        assert isinstance(default, int), (
            f"tuning_length: expected an option with a number of epochs, got {length}"
        )


def test_unknown_options_are_refused_by_name(defense_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        making.make("defense", defense_name, no_such_option=1)
