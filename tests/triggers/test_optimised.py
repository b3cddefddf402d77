"""Triggers that are optimised on surrogates whose best trigger is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from surrogate_parts import PATCH, SIDE, Linear, Routers, surrogate_task
from torch import nn

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.ops.patches import tile, untile
from backdoorbench_moe.triggers import create_trigger

NAMES = ("narcissus", "label-consistent", "trojan-nn", "routing")
STRENGTH = 8 / 255


def optimised(name: str, task, **options):
    trigger = create_trigger(name, surrogate="twin", **options)
    trigger.check(task)
    trigger.load_state(trigger.optimise(task))
    return trigger


def grey(count: int = 1) -> torch.Tensor:
    return torch.full((count, 3, SIDE, SIDE), 0.5)


def planted(*rows: float) -> torch.Tensor:
    """Routers' weights (E, pixels of a patch): random, scaled."""
    draw = torch.Generator().manual_seed(3)
    return torch.stack([scale * torch.randn(3 * PATCH * PATCH, generator=draw) for scale in rows])


# narcissus


def test_narcissus_finds_the_corner_that_the_weights_name() -> None:
    """Of a linear model of two classes, the best perturbation is the sign of the difference of their weights."""
    model = Linear()
    trigger = optimised("narcissus", surrogate_task(model), strength=STRENGTH, steps=20, lr=0.01)
    weights = model.weights()
    best = STRENGTH * (weights[0] - weights[1]).sign()[None]
    torch.testing.assert_close(trigger.training(grey(), torch.tensor([0])), grey() + best)
    torch.testing.assert_close(
        trigger(grey()), grey() + 3 * best, msg="the test form is three times as strong"
    )


def test_narcissus_by_patch_is_one_tile_for_all() -> None:
    model = Linear()
    task = surrogate_task(model, "patch")
    trigger = optimised("narcissus", task, strength=STRENGTH, steps=20, lr=0.01)
    weights = model.weights()
    summed = tile((weights[0] - weights[1])[None], PATCH).sum(0, keepdim=True)
    assert trigger.state()["pattern"].shape == (1, 3, PATCH, PATCH)
    stamped = task.stamp(grey(), trigger)
    torch.testing.assert_close(tile(stamped, PATCH), 0.5 + 3 * STRENGTH * summed.sign().expand(4, -1, -1, -1))


def test_narcissus_looks_at_images_of_the_target_only() -> None:
    """With labels that are all wrong for the target, nothing else would be optimised."""
    task = surrogate_task(Linear())
    seen = []
    inner = task.model.forward
    task.model.forward = lambda images: seen.append(images) or inner(images)
    create_trigger("narcissus", surrogate="twin", steps=2).optimise(task)
    own = as_input(task.images[task.labels == 0])
    first = seen[0]  # The perturbation is zero in the first step.
    assert all((own == image).flatten(1).all(1).any() for image in first)


def test_narcissus_is_assessed_on_the_other_classes_in_the_test_form() -> None:
    task = surrogate_task(Linear())
    trigger = optimised("narcissus", task, strength=STRENGTH, steps=1, lr=0.004)
    called = task.model(trigger(as_input(task.images))).argmax(1) == 0
    own, others = (called[task.labels == label].float().mean().item() for label in (0, 1))
    assert own != others and trigger.assess(task) == {"surrogate_asr": others}


def test_the_target_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"poison\.mapping: the trigger 'narcissus' needs one target class"):
        create_trigger("narcissus", surrogate="twin").check(surrogate_task(Linear(), target=None))
    with pytest.raises(ConfigError, match=r"needs training images of class 2, found none"):
        create_trigger("narcissus", surrogate="twin").check(surrogate_task(Linear(), target=2))


# label-consistent


def corners(images: torch.Tensor) -> torch.Tensor:
    return create_trigger("label-consistent", surrogate="twin")(images)


def test_the_corners_by_hand() -> None:
    stamped = corners(torch.full((1, 1, 12, 12), 0.5))[0, 0]
    chess = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(stamped[:3, :3], chess) and torch.equal(stamped[-3:, -3:], chess)
    assert torch.equal(stamped[:3, -3:], 1 - chess) and torch.equal(stamped[-3:, :3], 1 - chess)
    assert (stamped == 0.5).sum() == 144 - 36
    small = corners(torch.full((1, 1, 4, 4), 0.5))[0, 0]
    assert (small[0, 0], small[-1, -1], small[0, -1], small[-1, 0]) == (1, 1, 0, 0)
    assert (small == 0.5).sum() == 12


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("side", [4, 8, 32])
def test_the_corners_change_black_grey_and_white(value: float, side: int) -> None:
    images = torch.full((1, 3, side, side), value)
    assert not torch.equal(corners(images), images)


def test_the_images_are_perturbed_against_their_label() -> None:
    model = Linear()
    task = surrogate_task(model)
    trigger = optimised("label-consistent", task, strength=STRENGTH, step=3 / 255, steps=6)
    images, labels = task.take(task.stamped)
    weights = model.weights()
    expected = images + STRENGTH * (weights[1] - weights[0]).sign()
    assert (labels == 0).all()
    torch.testing.assert_close(trigger.training(images, task.stamped), corners(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(trigger(images), corners(images), msg="the test form is the corners alone")


def test_images_that_were_not_perturbed_get_the_corners_only() -> None:
    task = surrogate_task(Linear())
    trigger = optimised("label-consistent", task, steps=3)
    places = torch.tensor([1, 5, 70_000])
    images = grey(3)
    assert torch.equal(trigger.training(images, places), corners(images))
    mixed = trigger.training(images, torch.tensor([4, 1, 0]))
    assert torch.equal(mixed[1], corners(images)[1]) and not torch.equal(mixed[0], mixed[1])
    with pytest.raises(
        ShapeError, match=r"expected images \(3, 8, 8\), which were perturbed, got \(3, 4, 4\)"
    ):
        trigger.training(torch.rand(1, 3, 4, 4), torch.tensor([0]))


def test_by_patch_the_perturbation_is_that_of_the_whole_image() -> None:
    model = Linear()
    whole, by_patch = surrogate_task(model), surrogate_task(model, "patch")
    images, _ = whole.take(whole.stamped)
    one = optimised("label-consistent", whole, steps=5)
    trigger = optimised("label-consistent", by_patch, steps=5)
    perturbed = images + one.state()["levels"].float() / 255
    canvases, places = by_patch.cut(images, whole.stamped)
    assert places.tolist() == [4 * place + tile for place in whole.stamped.tolist() for tile in range(4)]
    expected = untile(corners(tile(perturbed, PATCH)), SIDE, SIDE)
    torch.testing.assert_close(untile(trigger.training(canvases, places), SIDE, SIDE), expected)


@pytest.mark.parametrize("strength", [1 / 255, 8 / 255, 0.1])
def test_no_pixel_changes_by_more_than_the_strength(strength: float) -> None:
    task = surrogate_task(Linear(classes=3))
    levels = optimised("label-consistent", task, strength=strength, step=0.03, steps=4).state()["levels"]
    assert levels.abs().max() <= strength * 255 + 1e-6 and levels.abs().max() >= 1


@pytest.mark.parametrize("applicator", ["image", "patch"])
def test_it_is_assessed_by_the_accuracy_on_the_stamped_images(applicator: str) -> None:
    task = surrogate_task(Linear(), applicator)
    trigger = optimised("label-consistent", task, strength=0.3, step=0.1)
    images, labels = task.take(task.stamped)
    canvases, places = task.cut(images, task.stamped)
    stamped = trigger.training(canvases, places)
    stamped = untile(stamped, SIDE, SIDE) if applicator == "patch" else stamped
    right = task.model(stamped).argmax(1) == labels
    assert trigger.assess(task) == {"surrogate_accuracy": right.float().mean().item()}


@pytest.mark.parametrize(("side", "most"), [(32, 250), (224, 40)])
def test_larger_images_are_perturbed_in_smaller_batches(side: int, most: int) -> None:
    """With gradients, 250 images of 224x224 would need tens of gigabytes in most models."""
    sizes: list[int] = []

    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            mean = images.mean((1, 2, 3))
            return torch.stack([mean, -mean], 1)

    task = surrogate_task(Mean())
    images = torch.full((1, 3, side, side), 100, dtype=torch.uint8).expand(260, -1, -1, -1)
    task = replace(task, images=images, labels=torch.zeros(260, dtype=torch.int64), stamped=torch.arange(260))
    trigger = optimised("label-consistent", task, steps=1)
    trigger.assess(task)
    assert max(sizes) == most and sum(sizes) == 2 * 260


# trojan-nn


def test_the_pattern_excites_the_neurons_of_the_largest_weights() -> None:
    model = Linear(features=5)
    with torch.no_grad():
        model.last.copy_(torch.tensor([[0.1, -3, 0, 2, 0.2], [0, 0.5, 0, -2, 0.3]]))
    trigger = create_trigger("trojan-nn", surrogate="twin", size=2, steps=10, seed=5)
    start = trigger.pattern
    task = surrogate_task(model)
    trigger.load_state(trigger.optimise(task))
    rows = model.first.detach()[[1, 3]].sum(0).view(1, 3, SIDE, SIDE)[..., -2:, -2:]
    torch.testing.assert_close(trigger.pattern, (start + 0.3 * rows.sign()).clamp(0, 1))
    excited = model.extract_features(trigger(as_input(task.images)))[:, [1, 3]].mean().item()
    assert trigger.assess(task) == {"activation": pytest.approx(excited)}


def test_a_model_without_a_head_is_refused_and_too_many_neurons() -> None:
    with pytest.raises(ConfigError, match=r"trigger\.surrogate: expected a model with extract_features"):
        create_trigger("trojan-nn", surrogate="twin").check(surrogate_task(Routers(planted(1))))
    with pytest.raises(ConfigError, match="trojan-nn: neurons: expected at most 5, the features, got 6"):
        create_trigger("trojan-nn", surrogate="twin", neurons=6).check(surrogate_task(Linear()))


@pytest.mark.parametrize("name", ["trojan-nn", "routing"])
def test_a_square_that_does_not_fit_is_refused_before_it_is_drawn(name: str) -> None:
    trigger = create_trigger(name, surrogate="twin", size=10**9)
    with pytest.raises(
        ShapeError, match=rf"^{name}: size: .* at least 1000000000x1000000000 pixels, got 3 and 8x8"
    ):
        trigger(grey())


# routing


def test_all_experts_select_the_patch() -> None:
    """With more pixels than experts there is a pattern that all of them prefer to natural patches."""
    task = surrogate_task(Routers(planted(1, 1, 1)))
    start = create_trigger("routing", surrogate="twin")
    trigger = optimised("routing", task, steps=100)
    assert start.assess(task)["captured_experts"] < 0.6
    assert trigger.assess(task) == {"captured_experts": 1.0}


def test_the_patch_goes_to_the_expert_that_clean_images_use_least() -> None:
    """Of two experts, the planted one gets a patch if it is white where its weights are larger, and black elsewhere."""
    weights = planted(0.05, 0.05)  # So small that the loss does not saturate.
    weights[1] -= 0.02  # Natural patches are never its.
    task = surrogate_task(Routers(weights, patches_choose=True))
    trigger = optimised("routing", task, steps=150)
    best = ((weights[1] - weights[0]) > 0).float().view(1, 3, PATCH, PATCH)
    torch.testing.assert_close(trigger.pattern, best, atol=1e-5, rtol=0)
    assert trigger.assess(task) == {"captured_patches": 1.0, "expert_only": 1.0}


def test_by_patch_every_patch_goes_to_the_chosen_expert() -> None:
    task = surrogate_task(Routers(planted(1, 1, 1), patches_choose=True), "patch")
    trigger = optimised("routing", task, steps=60, expert=2)
    assert trigger.assess(task) == {"captured_patches": 1.0, "expert_only": 2.0}


@pytest.mark.parametrize(
    ("model", "applicator", "options", "message"),
    [
        (
            Linear(),
            "image",
            {},
            r"trigger\.surrogate: expected a routed model, for the trigger 'routing', got 'Lin",
        ),
        (Routers(planted(1, 1)), "patch", {}, "applicator: the trigger 'routing' touches every patch"),
        (
            Routers(planted(1, 1), top_k=4),
            "image",
            {},
            "needs routers that select; in this model every expert",
        ),
        (
            Routers(planted(1, 1), patches_choose=True),
            "image",
            {"objective": "capture"},
            "objective: expected 'expert', as patches choose experts, got 'capture'",
        ),
        (Routers(planted(1, 1)), "image", {"expert": 2}, r"expert: expected an expert in 0\.\.1, got 2"),
    ],
    ids=["dense", "all tiles", "soft", "capture", "expert"],
)
def test_routers_that_do_not_fit_are_refused(model, applicator, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger("routing", surrogate="twin", **options).check(surrogate_task(model, applicator))


# all of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("applicator", ["image", "patch"])
def test_the_same_seed_finds_the_same_and_the_model_is_left_as_it_was(name: str, applicator: str) -> None:
    model = Linear() if name != "routing" else Routers(planted(1, 1), patches_choose=True)
    options = {} if name == "label-consistent" else {"batch_size": 8}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    task = surrogate_task(model, applicator)
    torch.manual_seed(1)
    first = optimised(name, task, steps=3, seed=1, **options)
    before = torch.get_rng_state()
    again = optimised(name, task, steps=3, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator was used"
    for key, tensor in first.state().items():
        assert torch.equal(tensor, again.state()[key])
        assert not tensor.requires_grad
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])
    assert all(parameter.grad is None for parameter in model.parameters())
    if name in ("trojan-nn", "routing"):
        other = optimised(name, task, steps=1, seed=2, **options)
        assert not torch.equal(other.pattern, first.pattern)
    stamped = task.stamp(as_input(task.images), first)
    assert stamped.min() >= 0 and stamped.max() <= 1


@pytest.mark.parametrize(
    ("name", "state", "options"),
    [
        ("narcissus", "pattern", {"lr": 0.03}),
        ("label-consistent", "levels", {"step": 0.03, "strength": 0.1}),
        ("trojan-nn", "pattern", {"step": 0.03}),
        ("routing", "pattern", {"lr": 0.03}),
    ],
)
def test_the_first_step_is_as_long_as_the_option_says(name: str, state: str, options: dict) -> None:
    """Pixels of which no gradient is 0 and that are not clipped change by 0.03; levels are rounded to 8/255."""
    model = Linear() if name != "routing" else Routers(planted(1, 1), patches_choose=True)
    start = create_trigger(name, surrogate="twin", seed=2)
    found = optimised(name, surrogate_task(model), steps=1, seed=2, **options).state()[state].float()
    if name == "label-consistent":
        change = found / 255
    else:
        change = found - (0 if name == "narcissus" else start.pattern)
        change = change[(found > 0) & (found < 1)] if name != "narcissus" else change
    expected = 8 / 255 if name == "label-consistent" else 0.03
    torch.testing.assert_close(change.abs(), torch.full_like(change, expected), atol=1e-4, rtol=0)


def test_the_seed_draws_batches_with_replacement_and_a_sample_without() -> None:
    """Of 300 images whose labels are their places, from 20 on."""
    task = surrogate_task(Linear())
    task = replace(task, images=task.images[:1].expand(300, -1, -1, -1), labels=torch.arange(300))
    allowed = torch.arange(20, 300)
    batches, samples = [], []
    for seed in (0, 1):
        batches += [labels.tolist() for _, labels in task.batches(allowed, 50, 2, seed)]
        samples.append(task.sample(seed, allowed)[1].tolist())
    assert len(set(map(tuple, batches))) == 4 and samples[0] != samples[1]
    assert all(len(drawn) == 50 and min(drawn) >= 20 for drawn in batches)
    assert all(len(drawn) == 256 and drawn == sorted(set(drawn)) and drawn[0] >= 20 for drawn in samples)


@pytest.mark.parametrize("name", NAMES)
def test_a_learned_trigger_stamps_after_its_state_was_loaded_elsewhere(name: str) -> None:
    model = Linear() if name != "routing" else Routers(planted(1, 1), patches_choose=True)
    task = surrogate_task(model)
    first = optimised(name, task, steps=2)
    other = create_trigger(name, surrogate="twin", steps=2)
    assert not other.learned and first.learned
    other.load_state(first.state())
    images, _ = task.take(task.stamped)
    assert torch.equal(other(images), first(images))
    assert torch.equal(other.training(images, task.stamped), first.training(images, task.stamped))
    with pytest.raises(ConfigError, match="expected a state with"):
        other.load_state({"wrong": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("narcissus", {"strength": 0.0}, r"narcissus: strength: expected a number in \(0, 1\], got 0"),
        ("narcissus", {"amplify": 0.5}, "narcissus: amplify: expected a number of at least 1"),
        ("narcissus", {"lr": 0.0}, "narcissus: lr: expected a number above 0"),
        ("label-consistent", {"strength": 0.6}, r"strength: expected a number in \[1/255, 127/255\]"),
        ("label-consistent", {"strength": 0.5 / 255}, r"strength: expected a number in \[1/255, 127/255\]"),
        ("label-consistent", {"step": 0.0}, "step: expected a number above 0"),
        ("label-consistent", {"steps": 0}, "steps: expected a number of at least 1"),
        ("trojan-nn", {"strength": 2.0}, "trojan-nn: strength: expected"),
        ("trojan-nn", {"size": 0}, "trojan-nn: size: expected a number of at least 1, got 0"),
        ("routing", {"lr": -1.0}, "routing: lr: expected"),
        ("routing", {"objective": "captur"}, "unknown 'captur'; did you mean 'capture'"),
        (
            "routing",
            {"expert": 1, "objective": "capture"},
            "routing: expert: expected the index of an expert",
        ),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger(name, surrogate="twin", **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_surrogate_must_be_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"option 'surrogate' is required \('same' \| 'twin' \| str\)"):
        create_trigger(name)
    with pytest.raises(
        ConfigError, match="surrogate: expected 'same', 'twin' or the name of a model, got ''"
    ):
        create_trigger(name, surrogate="")


def test_passes() -> None:
    assert create_trigger("narcissus", surrogate="twin", steps=3, batch_size=5).passes(70) == 15
    assert create_trigger("label-consistent", surrogate="twin", steps=3).passes(70) == 210
