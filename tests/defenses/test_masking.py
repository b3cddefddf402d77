"""ANP and RNP: a planted channel is found, losses against an own norm, thresholds, experts, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from defense_tasks import changed, copies, make_task, trained_model, used_model
from planted_channel import PLANTED, Planted, coloured, planted_task, rates
from torch import nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.masking import (
    MaskedModel,
    batch_statistics,
    low_units,
    shuffled_batches,
    steps_of_epoch,
)
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import muted
from backdoorbench_moe.moe.units import Units, expert_units, norm_units
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "options"), [("anp", {"steps": 20}), ("rnp", {})])
def test_the_channel_that_only_the_backdoor_uses_is_pruned(name, options) -> None:
    task = planted_task()
    assert rates(task.model) == (1.0, 1.0), "else there is nothing to remove"
    before = copies(task.model)
    result = create_defense(name, **options)(task)
    assert result.judgements[0].details["pruned"] == {"norm": [PLANTED]}
    assert result.judgements[0].suspicious == ["norm"] and len(result.judgements) == 1
    assert rates(result.model) == (1.0, 0.0)
    # The original model, of which one scale is zero; not the one that has unlearned.
    assert changed(before, copies(result.model)) == {"norm.weight"}
    assert (result.model.norm.weight == before["norm.weight"]).sum() == 6


def test_what_rnp_unlearns_is_a_copy() -> None:
    task = planted_task()
    before = copies(task.model)
    unlearned, accuracy = create_defense("rnp", unlearn_to=0.7, unlearn_lr=0.05).unlearn(task)
    assert accuracy <= 70 and rates(unlearned)[0] < 0.7 and rates(task.model)[0] == 1
    assert not changed(before, copies(task.model)) and changed(before, copies(unlearned))
    assert not unlearned.training


def test_a_step_of_unlearning_by_hand() -> None:
    """SGD up the loss, with batch statistics, a gradient of a norm of at most 20, and weight decay."""
    task = planted_task()
    with torch.no_grad():
        task.model.head.weight[1] *= -100
    twin = copy.deepcopy(task.model).train()
    loss = -F.cross_entropy(twin(task.clean.images.float() / 255), task.clean.labels)
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    norm = torch.cat([each.flatten() for each in gradients]).norm().item()
    assert norm > 30, "else nothing would be clipped"
    unlearned, _ = create_defense("rnp", epochs=1, batch_size=90, unlearn_lr=0.01).unlearn(task)
    for (name, found), weight, gradient in zip(
        unlearned.named_parameters(), task.model.parameters(), gradients, strict=True
    ):
        step = (weight - found) / 0.01
        torch.testing.assert_close(step, gradient * 20 / norm + 5e-4 * weight, rtol=0.01, atol=0.01, msg=name)
    torch.testing.assert_close(unlearned.norm.running_var, twin.norm.running_var)


def test_unlearning_ends_with_the_epoch_in_which_the_accuracy_is_low_enough() -> None:
    """An accuracy of at most 100% is reached at once; one of 0% never with so small a learning rate."""
    for unlearn_to, epochs in ((1.0, 1), (0.0, 4)):
        done: list[tuple[int, int]] = []
        task = replace(planted_task(), progress=lambda *given, done=done: done.append(given))
        options = {"unlearn_to": unlearn_to, "epochs": 4, "batch_size": 90, "unlearn_lr": 1e-9}
        create_defense("rnp", **options).unlearn(task)
        assert done == [(n, 8) for n in range(1, epochs + 1)]


def test_the_accuracy_is_that_of_the_images_that_are_used() -> None:
    """Of 25 images in batches of 12, one is left over in each epoch. The model is right about all of them."""
    task = planted_task()
    split = Split(task.clean.images[:25], task.clean.labels[:25])
    defense = create_defense("rnp", batch_size=12, epochs=1, unlearn_lr=1e-9)
    _, accuracy = defense.unlearn(replace(task, granted={"clean": split}))
    assert accuracy == 100


def test_the_masked_loss_is_that_of_a_norm_by_hand() -> None:
    """(m + d) gamma x + (1 + xi) beta, with the statistics of the batch."""
    model, split = Planted().eval(), coloured(12, 4)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2, generator=draws)
        model.norm.bias.uniform_(-1, 1, generator=draws)
    mask, change, shift = (torch.rand(7, generator=draws) for _ in range(3))
    masked = MaskedModel(model, norm_units(model), CPU, "fp32")
    masked.masks = [mask]
    before = copies(model)
    with batch_statistics(model):
        found = masked.loss(split, [change], {"norm": 1 + shift})
    maps = model.conv(split.images.float() / 255)
    variance, mean = torch.var_mean(maps, (0, 2, 3), keepdim=True, correction=0)
    scale, offset = (mask + change) * model.norm.weight, (1 + shift) * model.norm.bias
    normed = (maps - mean) / (variance + model.norm.eps).sqrt() * scale[:, None, None] + offset[:, None, None]
    logits = model.head(normed.relu().mean((2, 3)))
    # The contrast of smooth images is so small that the digits of its variance differ.
    torch.testing.assert_close(found, F.cross_entropy(logits, split.labels), rtol=1e-3, atol=0)
    assert not changed(before, copies(model)) and not model.norm.training, "statistics are as before"


def test_the_changes_of_anp_go_up_the_gradient_by_eps() -> None:
    task = planted_task()
    defense = create_defense("anp", eps=0.3)
    masked = MaskedModel(task.model, norm_units(task.model), CPU, "fp32")
    with batch_statistics(task.model):
        noise, shifts = defense._worst_change(masked, task.clean, torch.Generator().manual_seed(5))
        drawn = (2 * torch.rand(7, generator=torch.Generator().manual_seed(5)) - 1) * 0.3
        moved = (noise[0] - drawn).abs()
        torch.testing.assert_close(moved, torch.full((7,), 0.3))
        worse = masked.loss(task.clean, noise, shifts)
        assert worse > masked.loss(task.clean, [drawn]) and worse > masked.loss(task.clean)


def test_a_step_of_anp_by_hand() -> None:
    """The gradient of (1 - alpha) times the loss with changes plus alpha times that without, as in the paper."""
    task = planted_task()
    # With wrong labels, both losses have large gradients.
    task = replace(task, granted={"clean": Split(task.clean.images, task.clean.labels.roll(1))})
    defense = create_defense("anp", steps=1, alpha=0.3, eps=0.4, mask_lr=0.1, batch_size=90)
    units = norm_units(task.model)
    [found], _ = defense.learn_masks(task, units)
    masked = MaskedModel(task.model, units, CPU, "fp32")
    batch = next(shuffled_batches(task.clean, 90, task.seed))
    with batch_statistics(task.model):
        changes = defense._worst_change(masked, batch, generator(task.seed, "changes"))
        [worst] = torch.autograd.grad(masked.loss(batch, *changes), masked.masks)
        [usual] = torch.autograd.grad(masked.loss(batch), masked.masks)
    expected = (1 - 0.1 * (0.7 * worst + 0.3 * usual)).clamp(0, 1)
    torch.testing.assert_close(found.detach(), expected)
    for other in (worst, usual, 0.3 * worst + 0.7 * usual, 0.7 * worst):
        assert not torch.allclose(expected, (1 - 0.1 * other).clamp(0, 1)), "else the test could not tell"


class Answers:
    """Stands for a model's accuracy that depends only on how many channels are pruned."""

    def __init__(self, kept: dict[int, float]) -> None:
        self.kept = kept

    def __call__(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        gone = int((model.norm.weight == 0).sum())
        right = round(self.kept[gone] * len(images))
        answers = torch.zeros(len(images), 2)
        answers[:, 1] = (torch.arange(len(images)) >= right).float() * 2 - 1
        return answers


@pytest.mark.parametrize(
    ("drop", "threshold", "gone"), [(0, 0.3, 2), (4, 0.3, 2), (5, 0.5, 3), (50, 0.95, 6), (60, 0.95, 6)]
)
def test_the_accuracy_decides_on_the_threshold(drop, threshold, gone) -> None:
    """Masks .1, .1, .33, .55, .6, .7, 1: three pruned cost 5 points, all others 50."""
    model = Planted().eval()
    task, _ = make_task(model, clean=Split(torch.zeros(100, 3, 16, 16).byte(), torch.zeros(100).long()))
    answers = Answers({0: 1.0, 2: 1.0, 3: 0.95, 4: 0.5, 5: 0.5, 6: 0.5})
    defense = create_defense("anp", accuracy_drop=float(drop), threshold=0.2)
    defense.learn_masks = lambda *_: ([torch.tensor([0.1, 0.1, 0.33, 0.55, 0.6, 0.7, 1.0])], {})
    result = defense(replace(task, logits=answers))
    assert result.judgements[0].threshold == pytest.approx(threshold)
    assert int((model.norm.weight == 0).sum()) == gone
    assert result.judgements[0].details["accuracy"]["0.05"] == 100


def test_nothing_is_pruned_if_the_lowest_masks_cost_too_much() -> None:
    model = Planted().eval()
    before = copies(model)
    task, _ = make_task(model, clean=Split(torch.zeros(100, 3, 16, 16).byte(), torch.zeros(100).long()))
    defense = create_defense("rnp", accuracy_drop=4.0)
    defense.learn_masks = lambda *_: ([torch.tensor([0.0, 0, 0, 1, 1, 1, 1])], {})
    result = defense(replace(task, logits=Answers({0: 1.0, 3: 0.95})))
    assert not changed(before, copies(model))
    found = result.judgements[0]
    assert found.threshold is None and found.suspicious == [] and found.details["accuracy"] == {"0": 95.0}


def test_a_fixed_threshold_includes_its_value() -> None:
    task = planted_task()
    defense = create_defense("anp", threshold=0.25)
    defense.learn_masks = lambda *_: ([torch.tensor([0.25, 0.26, 1, 1, 0, 1, 1])], {})
    assert defense(task).judgements[0].details["pruned"] == {"norm": [0, 4]}


def test_every_layer_keeps_its_best_expert() -> None:
    units = Units("expert", "moe", ("moe/0", "moe/1", "moe/2"), {})
    assert low_units(units, torch.tensor([0.1, 0.2, 0.0]), 0.3) == [0, 2]
    assert low_units(units, torch.tensor([0.1, 0.5, 0.0]), 0.3) == [0, 2]
    assert low_units(replace(units, kind="gate"), torch.zeros(3), 0.3) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["pmoe", "mixture"])
def test_experts_and_gates_are_pruned_with_the_channels(kind) -> None:
    if kind == "pmoe":
        model = used_model()
        task, _ = make_task(model)
    else:
        model = build_mixture()
        task, _ = make_mixture_task(model)
    twin, defense = copy.deepcopy(model), create_defense("anp")

    def learned(task, units):
        assert {each.kind for each in units} == {"channel", "expert", "gate"}
        rest = [torch.ones(len(each)) for each in units]
        for each, mask in zip(units, rest, strict=True):
            mask[0] = float(each.kind != "expert")
        return rest, {}

    defense.learn_masks = learned
    result = defense(task)
    images = task.clean.images[:8].float() / 255
    first = [expert for expert in twin.experts() if expert.index == 0]
    with muted(twin, first), torch.no_grad():
        torch.testing.assert_close(model(images), twin(images))
    assert result.judgements[1].suspicious == [expert.name for expert in first]
    assert set(result.judgements[1].details["gates"]) == {expert.name for expert in twin.experts()}


def test_the_mask_of_an_expert_can_rise_again() -> None:
    """At 0 a ReLU would pass no gradient; at the lowest mask that is allowed, it does."""
    model = used_model()
    [units] = expert_units(model)
    masked = MaskedModel(model, [units], CPU, "fp32")
    with torch.no_grad():
        masked.masks[0].fill_(-1)
    masked.clip()
    assert masked.masks[0].tolist() == pytest.approx([0.001] * 4)
    high = MaskedModel(model, norm_units(model)[:1], CPU, "fp32")
    with torch.no_grad():
        high.masks[0].fill_(2)
        high.masks[0][:2] = torch.tensor([-1.0, 0.5])
    high.clip()
    assert high.masks[0].tolist() == [0, 0.5] + [1] * (len(high.masks[0]) - 2)
    [gradient] = torch.autograd.grad(masked.loss(coloured(12, 1)), masked.masks)
    assert (gradient != 0).all()


@pytest.mark.slow
def test_an_expert_that_only_harms_is_muted_without_a_hint() -> None:
    """Expert 1 of a trained pMoE speaks for one class whatever it sees; ANP finds it by itself."""
    model, clean = trained_model()
    with torch.no_grad():
        model.norm.weight[5:10], model.norm.bias[5:10] = 0.3, 3
        model.head.weight[:, 5:10] = torch.tensor([[4.0], [-4.0], [-4.0]])
    task, _ = make_task(model, clean=clean)
    result = create_defense("anp", steps=8, batch_size=60)(task)
    scores = result.judgements[1].scores
    assert min(scores, key=scores.get) == "moe/1" and "moe/1" in result.judgements[1].suspicious


def test_the_form_without_experts_masks_channels_only() -> None:
    model = used_model()
    before = copies(model)
    result = create_defense("rnp", experts=False, threshold=0.99, epochs=2)(make_task(model)[0])
    assert len(result.judgements) == 1
    assert all(".weight" in name and "norm" in name for name in changed(before, copies(model)))


def test_layer_norms_are_masked_as_well() -> None:
    model = used_model("convnext")
    result = create_defense("anp", steps=1)(make_task(model, name="convnext")[0])
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert set(result.judgements[0].scores) == norms


def test_batches_leave_no_single_image() -> None:
    split = Split(torch.arange(9).view(9, 1, 1, 1).expand(9, 3, 1, 1).byte(), torch.arange(9))
    feed = shuffled_batches(split, 4, seed=1)
    sizes = [len(next(feed)) for _ in range(4)]
    assert sizes == [4] * 4 and steps_of_epoch(9, 4) == 2 and steps_of_epoch(10, 4) == 3
    whole = next(shuffled_batches(split, 20, seed=1))
    assert sorted(whole.labels.tolist()) == list(range(9)) and steps_of_epoch(9, 20) == 1
    again = next(shuffled_batches(split, 20, seed=1))
    assert torch.equal(again.labels, whole.labels)


def test_a_single_image_makes_no_batch() -> None:
    with pytest.raises(ValueError, match="shuffled_batches: expected at least 2 images, got 1"):
        next(shuffled_batches(coloured(1, 1), 4, seed=1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("anp", {"threshold": 1}, r"threshold: expected a number in \[0, 1\), got 1"),
        ("anp", {"accuracy_drop": -1}, "accuracy_drop: expected a number of at least 0"),
        ("anp", {"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ("anp", {"eps": 0}, "eps: expected a positive number, got 0"),
        ("anp", {"alpha": 1.5}, r"alpha: expected a number in \[0, 1\], got 1.5"),
        ("rnp", {"batch_size": 1}, "batch_size: expected an integer of at least 2, got 1"),
        ("rnp", {"unlearn_to": 2}, r"unlearn_to: expected a number in \[0, 1\], got 2"),
        ("rnp", {"unlearn_lr": 0}, "unlearn_lr: expected a positive number, got 0"),
        ("rnp", {"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(name, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("anp", {"eps": 1e38, "steps": 2}, r"eps: the masks are not finite with 1e\+38; lower it"),
        ("rnp", {"unlearn_lr": 1e30}, r"unlearn_lr: the masks are not finite with 1e\+30; lower it"),
    ],
)
def test_masks_that_are_not_finite_are_refused(name, options, message) -> None:
    task = planted_task()
    before = copies(task.model)
    with pytest.raises(ConfigError, match=message):
        create_defense(name, **options)(task)
    assert not changed(before, copies(task.model))


def test_models_without_norms_or_experts_are_refused() -> None:
    for name in ("anp", "rnp"):
        with pytest.raises(ConfigError, match="model: Linear has no norm with a scale for each channel"):
            create_defense(name).check(nn.Linear(3, 3))
        with pytest.raises(ConfigError, match="model: expected a routed model, WideResNet has no routing"):
            create_defense(name, experts=True).check(used_model("wide_resnet"))


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_a_single_image_is_refused(name) -> None:
    """Of data of one class, one image would be enough by the general rule."""
    with pytest.raises(ConfigError, match=r"clean_fraction: 0.05 of 20 images is 1; expected at least 2"):
        create_defense(name).count(20, 1)
    assert create_defense(name).count(40, 1) == 2
