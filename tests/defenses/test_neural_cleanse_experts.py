"""Neural Cleanse toward experts finds the pattern that a router was made to send to one of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model
from planted_router import EXPERTS, PLANT, PLANTED, SIDE, PlantedRouter, smooth_images

from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.goals import ExpertGoal
from backdoorbench_moe.defenses.inversion import Found, Search, invert
from backdoorbench_moe.defenses.neural_cleanse import indices_of
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.outliers import anomaly_indices
from backdoorbench_moe.testing import making
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task

FORMS = [("experts", "image"), ("experts", "patch"), ("patches", "image")]
NAMES = [f"layer0/{e}" for e in range(EXPERTS)]


def planted_task(model: PlantedRouter, clean: Split) -> DefenseTask:
    task, _ = making.make_task(model.eval(), PartSpec("none"), clean=clean)
    return replace(task, image_size=SIDE)


def judge(model: PlantedRouter, clean: Split, applicator: str, **given):
    options = {
        "epochs": 80,
        "batch_size": 8,
        "success": 0.98,
        "unlearn": "none",
        "clean_fraction": 1.0,
        **given,
    }
    task = planted_task(model, clean)
    [judgement] = create_defense("neural-cleanse", toward="experts", applicator=applicator, **options)(
        task
    ).judgements
    return judgement


@cache
def found(choice: str, applicator: str):
    """The judgement about a planted router; several tests look at it."""
    return judge(PlantedRouter(choice), smooth_images(32), applicator)


@pytest.mark.parametrize(("choice", "applicator"), FORMS)
def test_a_planted_expert_is_found_with_the_pattern_that_it_reacts_to(choice, applicator) -> None:
    judgement = found(choice, applicator)
    name = NAMES[PLANTED]
    assert judgement.about == "expert" and list(judgement.scores) == NAMES
    assert judgement.suspicious == [name] and judgement.scores[name] > 5
    sizes, success = judgement.details["sizes"], judgement.details["success"]
    assert sizes[name] < min(size for other, size in sizes.items() if other != name) / 3
    assert success[name] > 0.85
    mask, pattern = judgement.arrays["masks"][PLANTED], judgement.arrays["patterns"][PLANTED]
    assert mask.shape == (1, 4, 4) and judgement.arrays["patterns"].shape == (EXPERTS, 3, 4, 4)
    assert mask.sum().item() == pytest.approx(sizes[name], rel=1e-5)
    reacted = PLANT.abs().amax(0) > 0
    assert mask[0, reacted].sum() > 0.9 * mask.sum()
    # Where the stamp is most opaque, it is dark or has the colour that the expert wants.
    opaque = (mask > mask.max() / 2).expand(3, -1, -1) & (PLANT != 0)
    assert opaque.any() and ((pattern > 0.5) == (PLANT > 0))[opaque].all()


@pytest.mark.parametrize(("choice", "applicator"), FORMS)
def test_without_the_plant_that_expert_is_like_the_others(choice, applicator) -> None:
    sizes = judge(PlantedRouter(choice, strength=0), smooth_images(32), applicator).details["sizes"]
    assert sizes[NAMES[PLANTED]] > 0.6 * max(sizes.values())


@pytest.mark.parametrize(("choice", "applicator"), FORMS)
def test_shuffled_images_with_other_labels_have_the_same_verdict(choice, applicator) -> None:
    clean = smooth_images(32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    shuffled = judge(PlantedRouter(choice), Split(clean.images[order], clean.labels), applicator)
    assert shuffled.suspicious == found(choice, applicator).suspicious == [NAMES[PLANTED]]


def test_the_labels_have_no_part_in_the_search() -> None:
    clean = smooth_images(12)
    one, other = (
        judge(PlantedRouter(), Split(clean.images, labels), "image", epochs=4)
        for labels in (clean.labels, clean.labels.flip(0))
    )
    assert one.scores == other.scores and one.details == other.details


@pytest.mark.parametrize(("choice", "applicator"), FORMS)
def test_success_is_counted_patch_by_patch(choice, applicator) -> None:
    """A second implementation, in loops: of the stamped patches that the expert does not have, those it gets."""
    model, clean = PlantedRouter(choice), smooth_images(12)
    places = [torch.tensor([5] * 6 + [14] * 6)] if applicator == "image" else [None]
    task = planted_task(model, clean)
    goal = ExpertGoal(model, clean, "fp32", task.routing(model, clean.images), *places)
    found = invert(goal, range(EXPERTS), Search(4, 8, 0.98, 5, None, 0))
    before = model.forward_routed(clean.images.float() / 255).routing[0].selected
    for expert in range(EXPERTS):
        mask, pattern = found.values[expert, :1], found.values[expert, 1:]
        hits = count = 0
        for number in range(12):
            image = clean.images[number].float() / 255
            stamped = [*range(16)] if places[0] is None else [int(places[0][number])]
            for patch in stamped:
                rows, columns = (slice(4 * at, 4 * at + 4) for at in divmod(patch, 4))
                image[:, rows, columns] = torch.lerp(image[:, rows, columns], pattern, mask)
            after = model.forward_routed(image.unsqueeze(0)).routing[0].selected
            new = [patch for patch in stamped if not before[number, expert, patch]]
            hits, count = hits + sum(bool(after[0, expert, patch]) for patch in new), count + len(new)
        assert count > 0 and found.success[expert] == pytest.approx(hits / count)


def test_the_default_of_success_is_lower_for_experts() -> None:
    assert create_defense("neural-cleanse").success == 0.98
    assert create_defense("neural-cleanse", toward="experts").success == 0.8


def test_experts_are_compared_within_their_layer() -> None:
    clean = smooth_images(6)
    model = PlantedRouter(layers=2)
    task = planted_task(model, clean)
    goal = ExpertGoal(model, clean, "fp32", task.routing(model, clean.images), places=None)
    assert goal.names == [*NAMES, *(f"layer1/{e}" for e in range(EXPERTS))]
    sizes = [1.0, 2.0, 3.0, 4.0, 100.0, 300.0, 310.0, 330.0]
    found = Found(torch.zeros(8, 4, 1, 1), sizes, [1.0] * 8, [1] * 8, [False] * 8)
    both = [*anomaly_indices(sizes[:4]), *anomaly_indices(sizes[4:])]
    assert indices_of(goal, found) == pytest.approx(both) and both[4] > 5 > 2 > both[0]


def test_targets_that_share_a_pass_get_what_each_gets_alone() -> None:
    """In particular experts of two layers."""
    alone, together = (
        judge(PlantedRouter(layers=2), smooth_images(12), "patch", epochs=8, classes_at_once=count)
        for count in (1, 8)
    )
    assert list(together.details["sizes"].values()) == pytest.approx(
        list(alone.details["sizes"].values()), abs=1e-3
    )
    torch.testing.assert_close(together.arrays["masks"], alone.arrays["masks"], atol=1e-4, rtol=0)


def test_an_expert_that_has_all_patches_cannot_be_captured() -> None:
    model = PlantedRouter(strength=0)
    with torch.no_grad():
        model.routers[0].copy_(torch.zeros_like(model.routers[0]))
        model.routers[0][1] = 1.0
    judgement = judge(model, smooth_images(6), "patch", epochs=2)
    assert judgement.details["failed"] == NAMES and judgement.suspicious == []
    assert judgement.details["success"][NAMES[1]] == 0
    assert set(judgement.details["sizes"].values()) == {16.0}


@pytest.mark.parametrize("unlearn", ["flagged", "smallest", "all"])
def test_stamps_of_experts_are_unlearned_with_true_labels(unlearn) -> None:
    task, _ = make_task(used_model())
    options = {"epochs": 1, "threshold": 1e9, "unlearn_epochs": 1, "clean_fraction": 1.0}
    before = copies(task.model)
    result = create_defense("neural-cleanse", toward="experts", unlearn=unlearn, **options)(task)
    [judgement] = result.judgements
    names = [f"moe/{e}" for e in range(4)]
    largest = max(names, key=lambda name: judgement.scores[name])
    expected = {"flagged": [], "smallest": [largest], "all": names}[unlearn]
    assert judgement.details["unlearned"] == expected and result.stage == "unlearned"
    assert bool(changed(before, copies(result.model))) == bool(expected)
    assert all(each.requires_grad for each in result.model.parameters())


def test_the_experts_of_a_mixture_are_judged() -> None:
    model = build_mixture(gate="sample-top1")
    task, _ = make_mixture_task(model, gate="sample-top1")
    [judgement] = create_defense("neural-cleanse", toward="experts", epochs=1, unlearn="none")(
        task
    ).judgements
    assert list(judgement.scores) == [expert.name for expert in model.experts()]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("wide_resnet", {}, "^model: expected a routed model, WideResNet has no routing$"),
        (
            "pmoe",
            {"applicator": "patch"},
            "^applicator: expected 'image' for toward=experts, as experts of PMoE choose among patches, "
            "all of which would have the same stamp, got 'patch'$",
        ),
        (
            "pmoe",
            {"applicator": "patch", "patch_size": 4},
            "^patch_size: expected none for toward=experts, got 4$",
        ),
        (
            "soft",
            {},
            "^toward: a stamp captures experts only where routers select; in this MergedModel every expert processes "
            "every patch$",
        ),
    ],
)
def test_where_nothing_can_be_captured_is_refused(model, options, message) -> None:
    built = build_mixture(gate="soft") if model == "soft" else used_model(model)
    with pytest.raises(ConfigError, match=message):
        defense = create_defense("neural-cleanse", toward="experts", **options)
        defense.check_model(built)
        defense.check_images(built, 32)


def test_the_check_leaves_the_model_and_the_generator_as_they_were() -> None:
    """The mode of every module, too: one that rests in evaluation mode is not put in training mode."""
    model = build_mixture(gate="sample-top1").train()
    resting = model.layers()[0]
    resting.eval()
    before, state = copies(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    create_defense("neural-cleanse", toward="experts").check_images(model, 32)
    assert not changed(before, copies(model)) and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes and not resting.training


def test_how_often_an_expert_of_four_is_an_outlier_by_chance() -> None:
    """As the documentation says: one layer of five, if sizes are normally distributed."""
    sizes = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)).double() + 10
    alarms = sum(bool((anomaly_indices(layer) > 2).any()) for layer in sizes.tolist())
    assert alarms / 4000 == pytest.approx(1 / 5, abs=0.02)
