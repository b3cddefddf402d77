"""NAD: attention by hand, the loss from parts of the model, and a teacher that is the model after plain tuning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model
from torch.nn import functional as F

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.nad import attention, attention_distance, gate_distance
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.ops.images import as_input


def test_attention_and_its_distance_by_hand() -> None:
    """Two channels at two positions, (1, 2) and (2, 0): the sums of squares are 5 and 4, of norm sqrt(41)."""
    features = torch.tensor([[[1.0, -2.0], [2.0, 0.0]]])
    assert attention(features).tolist() == [pytest.approx([5 / 41**0.5, 4 / 41**0.5])]
    # Squares 9 and 16 of one channel: attention (9, 16) / sqrt(337).
    other = torch.tensor([[[3.0, 4.0]]])
    first, second = 5 / 41**0.5 - 9 / 337**0.5, 4 / 41**0.5 - 16 / 337**0.5
    assert attention_distance(features, other).item() == pytest.approx((first**2 + second**2) / 2)
    assert attention_distance(features, -3 * features).item() == pytest.approx(0)
    assert torch.equal(attention(torch.zeros(1, 2, 3)), torch.zeros(1, 3))


def test_the_distance_of_gates_by_hand() -> None:
    """One image, two experts, two patches. The first expert has gates (3, 4) / 10 and (1, 0), normalised (.6, .8) and
    (1, 0): squares .16 and .64. The second has the same gates twice. The mean over four numbers is .2."""

    def routing(first: list[float]) -> list[Routing]:
        gates = torch.tensor([[first, [0.5, 0.5]]])
        return [Routing("moe", gates, gates > 0)]

    assert gate_distance(routing([0.3, 0.4]), routing([1.0, 0.0])).item() == pytest.approx(0.2)


def run(model, **options):
    task, reported = make_task(model)
    return create_defense("nad", **{"epochs": 1, **options})(task), dict(reported)


@pytest.mark.parametrize("scope", ["all", "experts"])
def test_the_teacher_is_the_model_after_plain_tuning(scope) -> None:
    result, reported = run(used_model(), scope=scope, teacher_epochs=2)
    plain = used_model()
    create_defense("fine-tuning", scope=scope, epochs=2)(make_task(plain)[0])
    assert result.stage == "distilled" and not changed(copies(plain), reported["teacher"])
    assert changed(reported["teacher"], copies(result.model))
    unscoped = used_model()
    if scope == "experts":
        own = ("moe.norm.", "moe.conv.", "norm.")
        assert all(name.startswith(own) for name in changed(copies(unscoped), copies(result.model)))


@pytest.mark.parametrize(("maps", "last"), [("all", "experts"), ("trunk", "cells")])
def test_the_loss_is_that_of_tuning_plus_weighted_distances(maps, last) -> None:
    model, teacher, calls = used_model(), used_model(seed=1), []
    task, _ = make_task(model)
    images, labels = as_input(task.clean.images), task.clean.labels

    def tune(tuned, split, **options) -> None:
        calls.append(options)
        if options.get("objective") is None:
            tuned.load_state_dict(teacher.state_dict())
        else:
            calls.append(options["objective"](tuned, images, labels))

    betas = (2.0, 30.0, 400.0)
    create_defense("nad", maps=maps, betas=betas, gate_weight=50.0)(replace(task, tune=tune))
    logits, loss = calls[-1]

    def features(net):
        outputs = net.trunk(images)
        cells = net.reduce(F.relu(net.reduce_norm(outputs)))
        first = {}
        hook = net.trunk.block1.register_forward_hook(lambda _, __, output: first.update(map=output))
        net.trunk(images)
        hook.remove()
        return [first["map"], outputs, net.moe(cells)[0] if last == "experts" else cells], net.moe(cells)[1]

    expected = F.cross_entropy(model(images), labels)
    (own, gates), (target, wanted) = features(model), features(teacher)
    for beta, one, other in zip(betas, own, target, strict=True):
        sums = [each.square().sum(1).flatten(1) for each in (one, other)]
        one, other = (each / each.norm(dim=1, keepdim=True) for each in sums)
        expected = expected + beta * (one - other).square().mean()
    one, other = (each / each.norm(dim=2, keepdim=True) for each in (gates, wanted))
    expected = expected + 50 * (one - other).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, model(images))


def test_the_attention_of_the_model_follows_a_teacher_of_other_weights() -> None:
    teacher, distances = used_model(seed=1), []
    for beta in (0.0, 1000.0):
        model = used_model()
        task, _ = make_task(model, optimizer="adamw", lr=0.003)

        def tune(tuned, split, *, task=task, **options) -> None:
            if options.get("objective") is None:
                tuned.load_state_dict(teacher.state_dict())
            else:
                task.tune(tuned, split, **options)

        defense = create_defense("nad", layers=("trunk",), betas=(beta,), epochs=4)
        defense(replace(task, tune=tune))
        images = as_input(task.clean.images)
        with torch.no_grad():
            maps = [net.trunk(images).flatten(2) for net in (model, teacher)]
        distances.append(attention_distance(*maps).item())
    assert distances[1] < 0.75 * distances[0]


def test_what_does_not_fit_is_refused() -> None:
    dense = used_model("wide_resnet")
    with pytest.raises(ConfigError, match="model: expected a routed model, WideResNet has no routing"):
        create_defense("nad", gate_weight=1.0).check(dense)
    with pytest.raises(ConfigError, match="model: expected a model with a router, WideResNet has none"):
        create_defense("nad", maps="trunk").check(dense)
    with pytest.raises(UnknownNameError, match="layers: unknown 'blok3'; did you mean 'block3'"):
        create_defense("nad", layers=("blok3",), betas=(1.0,)).check(dense)
    dense.train()
    before = {name: buffer.clone() for name, buffer in dense.named_buffers()}
    with pytest.raises(ConfigError, match="layers: the output of 'head' is not a feature map"):
        create_defense("nad", layers=("head",), betas=(1.0,)).check_images(dense, 32)
    create_defense("nad", layers=("block3",), betas=(1.0,)).check_images(dense, 32)
    assert all(module.training for module in dense.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in dense.named_buffers())
    with pytest.raises(ConfigError, match="layers: expected 3 names, as many as there are betas"):
        create_defense("nad", layers=("block3",))
    with pytest.raises(ConfigError, match="betas: expected a number of at least 0, got -1"):
        create_defense("nad", betas=(1.0, -1.0))
