"""I-BAU: the perturbation, its form on tiles, plain Adam as the control, and planted patterns that are unlearned."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import changed, copies, held_images, make_task, used_model
from planted_pattern import accuracy, planted
from torch.nn import functional as F

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.i_bau import _batches
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.hypergradient import fixed_point_hypergradient
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.ops.patches import tile as cut
from backdoorbench_moe.ops.seeding import generator

FORMS = {"image": {}, "patch": {"applicator": "patch", "patch_size": 4}}


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_pattern_is_unlearned_and_not_by_the_control(form) -> None:
    effects = {}
    for portion in (0.5, 0.0):
        model, pattern, clean = planted(form)
        images, labels = as_input(clean.images), clean.labels
        assert accuracy(model, images, labels) == 1
        assert accuracy(model, images + pattern, labels) == pytest.approx(1 / 3)
        task, _ = make_task(model, clean=clean, batch_size=40)
        options = {"lr": 0.01, "radius": 1.0, "rounds": 20, "inner_steps": 10, "portion": portion}
        result = create_defense("i-bau", **options, **FORMS[form])(task)
        assert result.stage == "unlearned" and accuracy(model, images, labels) == 1
        effects[portion] = (model.head.weight[0] @ pattern.flatten()).item()
    assert effects[0.5] < 1.5 and effects[0.0] > 1.95, "it was 2"


@pytest.mark.parametrize("form", FORMS)
def test_the_perturbation_misleads_and_stays_in_its_ball(form) -> None:
    model, _, clean = planted(form)
    task, _ = make_task(model, clean=clean, batch_size=20)
    defense = create_defense("i-bau", radius=1.0, **FORMS[form])
    game = defense._game(task)
    spread = game.spread(defense._seek(task, game, 0))
    assert spread.shape == (1, 3, 8, 8) and spread.norm().item() == pytest.approx(1, rel=1e-4)
    assert accuracy(model, as_input(clean.images) + spread, clean.labels) < 0.4
    tiles = cut(spread, 4)
    assert (form == "patch") == torch.equal(tiles, tiles[:1].expand_as(tiles))
    small = create_defense("i-bau", inner_steps=1, inner_lr=1e-3, **FORMS[form])
    assert 0 < game.spread(small._seek(task, game, 0)).norm() < 1, "inside of the ball nothing is scaled"


def test_the_perturbation_takes_exactly_its_steps_over_images_in_new_orders() -> None:
    """Of 20 images in batches of 8, five steps are a pass of three, and two of the next one."""
    task, _ = make_task(used_model(), clean=held_images(20))
    found = [images for images, _ in _batches(task, 5, "inner", 0)]
    assert [len(each) for each in found] == [8, 8, 4, 8, 8]
    first, clean = torch.cat(found[:3]), as_input(task.clean.images)
    order = [next(n for n, each in enumerate(clean) if torch.equal(each, image)) for image in first]
    assert sorted(order) == list(range(20)) and not torch.equal(torch.cat(found[3:]), first[:16])


def test_a_step_on_a_tile_is_that_of_the_image_averaged_over_the_tiles() -> None:
    model, _, clean = planted("patch")
    images, labels = as_input(clean.images[:7]), clean.labels[:7]
    task, _ = make_task(model, clean=clean)
    games = {form: create_defense("i-bau", penalty=0.3, **FORMS[form])._game(task) for form in FORMS}
    tile = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    whole = tile.detach().repeat(1, 1, 2, 2).requires_grad_()
    stepped = games["image"].descend(whole, images, labels, 0.7)
    loss = 0.3 * whole.square().sum() - F.cross_entropy(model(images + whole), labels)
    torch.testing.assert_close(stepped, whole - 0.7 * torch.autograd.grad(loss, whole)[0])
    found = games["patch"].descend(tile, images, labels, 0.7)
    torch.testing.assert_close(found, cut(stepped, 4).mean(0, keepdim=True))


def test_the_control_is_adam_on_clean_images() -> None:
    models = [used_model("preact_resnet18") for _ in range(2)]
    task, _ = make_task(models[0], name="preact_resnet18", clean=held_images(12), batch_size=6)
    create_defense("i-bau", rounds=2, inner_steps=1, portion=0.0, lr=0.01)(task)
    optimizer = torch.optim.Adam(models[1].parameters(), lr=0.01)
    for number in range(2):
        order = torch.randperm(12, generator=generator(task.seed, "order", "outer", number, 0))
        for rows in order.split(6):
            optimizer.zero_grad()
            logits = models[1](as_input(task.clean.images[rows]))
            F.cross_entropy(logits, task.clean.labels[rows]).backward()
            optimizer.step()
    for name, expected in copies(models[1]).items():
        torch.testing.assert_close(copies(models[0])[name], expected, rtol=1e-3, atol=1e-4)


def test_the_second_term_of_the_gradient_is_the_implicit_one() -> None:
    """With one step K it is what one step of descent on the perturbation changes: the difference quotient of
    E(F(d, w)), with d held fixed, in the direction of the gradient of E at d."""
    model, _, clean = planted("patch")
    model = model.double()
    images, labels = as_input(clean.images[:20]).double(), clean.labels[:20]
    task, _ = make_task(model, clean=clean)
    game = create_defense("i-bau")._game(task)
    spread = (0.05 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))).double()
    spread.requires_grad_()

    outer = F.cross_entropy(model(images + spread), labels)
    [into] = torch.autograd.grad(outer, spread, retain_graph=True)
    direct = torch.autograd.grad(outer, game.weights, retain_graph=True)
    mapped = game.descend(spread, images, labels, 0.1, create_graph=True)
    found = fixed_point_hypergradient(outer, mapped, spread, game.weights, steps=1)
    weight, eps = model.head.weight, 1e-6
    for row, column in ((0, 3), (2, 100)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[row, column] += sign * eps
            values.append((game.descend(spread, images, labels, 0.1) * into).sum().item())
            with torch.no_grad():
                weight[row, column] -= sign * eps
        quotient = (values[0] - values[1]) / (2 * eps)
        implicit = (found[0] - direct[0])[row, column].item()
        assert implicit == pytest.approx(quotient, rel=1e-4) and abs(implicit) > 1e-8


@pytest.mark.parametrize(("name", "side"), [("pmoe", 4), ("wide_resnet", 4), ("image", 32)])
def test_the_side_of_the_tile(name, side) -> None:
    form = "image" if name == "image" else "patch"
    model = used_model("pmoe" if name == "image" else name)
    game = create_defense("i-bau", applicator=form)._game(make_task(model, name=name)[0])
    assert game.tile_shape == (1, 3, side, side) and game.repeats == (32 // side, 32 // side)


@pytest.mark.parametrize(("scope", "prefixes"), [("router", ("moe.router.",)), ("head", ("head.",))])
def test_only_what_is_in_scope_changes_and_no_statistics(scope, prefixes) -> None:
    model = used_model()
    before = copies(model)
    defense = create_defense("i-bau", applicator="patch", scope=scope, rounds=1, inner_steps=2)
    defense(make_task(model)[0])
    names = changed(before, copies(model))
    assert names and all(name.startswith(prefixes) for name in names)
    assert all(weight.grad is None for weight in model.parameters())


def test_what_does_not_fit_is_refused() -> None:
    dense = used_model("wide_resnet")
    with pytest.raises(ConfigError, match="patch_size: expected a divisor of the image's 32 pixels, got 5"):
        create_defense("i-bau", applicator="patch", patch_size=5)(make_task(dense, name="wide_resnet")[0])
    with pytest.raises(ConfigError, match="patch_size: expected none for the applicator image, got 4"):
        create_defense("i-bau", patch_size=4)
    with pytest.raises(ConfigError, match=r"scope: expected one of .* for WideResNet, got 'router'"):
        create_defense("i-bau", scope="router").check(dense)
    with pytest.raises(ConfigError, match=r"portion: expected a number in \[0, 1\], got 2"):
        create_defense("i-bau", portion=2.0)
