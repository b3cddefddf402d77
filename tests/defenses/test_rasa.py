"""RASA: what each step changes, its reference, and what it repairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poisoned_mixtures import POISONED, accuracy, poisoned_mixture, unsafe
from torch.nn import functional as F

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.rasa import mean_gates
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.merging import only_expert
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.testing.making import changed, copies, used_model


@pytest.mark.slow
def test_it_repairs_the_poisoned_expert_itself_which_gates_alone_do_not() -> None:
    """After an alignment of the gates the expert alone is as unsafe as before; after RASA it is not."""
    alone = {}
    for name in ("align", "rasa"):
        model, task, _ = poisoned_mixture()
        before = unsafe(task, model)
        create_defense(name)(task)
        assert before > 90 and unsafe(task, model) < 20 and accuracy(task, model) > 90
        with only_expert(model, POISONED):
            alone[name] = unsafe(task, model)
    assert alone["align"] > 90 and alone["rasa"] < 20


@pytest.mark.slow
def test_the_divergence_brings_the_routing_of_marked_images_to_the_reference() -> None:
    """The gates prefer the poisoned expert for marked images; its share of them falls towards that of clean ones."""
    shares = {}
    for weight in (0.0, 10.0):
        model, task, _ = poisoned_mixture()
        reference = mean_gates(task)
        create_defense("rasa", kl_weight=weight, rounds=1, epochs=20)(task)
        [batch] = task.routing(model, task.marked.images)
        shares[weight] = max(
            (each.gates.mean((0, 2)) - known.mean(1)).abs().max().item()
            for each, known in zip(batch, reference, strict=True)
        )
    assert shares[10.0] < 0.5 * shares[0.0]


def test_experts_and_gates_take_turns() -> None:
    model, task, reported = poisoned_mixture()
    calls = []

    def tune(model, split, **given) -> None:
        calls.append((split, given))

    object.__setattr__(task, "tune", tune)
    result = create_defense("rasa", rounds=2, epochs=3, lr=0.2)(task)
    assert [name for name, _ in reported] == ["round 1"] and result.stage == "round 2"
    assert all(split is task.marked and given["epochs"] == 3 for split, given in calls)
    assert [given["lr"] for _, given in calls] == [0.2, 0.05, 0.2, 0.05]
    experts, routers = ([getattr(each, kind) for each in model.layers()] for kind in ("experts", "router"))
    assert [given["modules"] for _, given in calls] == [experts, routers, experts, routers]


def test_the_loss_of_the_gates_is_the_divergence_of_marked_images_plus_that_of_clean_answers() -> None:
    """3 KL(p || q) + 0.5 CE: p are the mean gates of clean images, q those of a marked image; a mean over layers."""
    model, task, _ = poisoned_mixture()
    calls: list[dict[str, Any]] = []
    object.__setattr__(task, "tune", lambda model, split, **given: calls.append(given))
    with torch.no_grad():
        known = [each.gates.mean(0) for each in model.forward_routed(as_input(task.clean.images)).routing]
    create_defense("rasa", rounds=1, kl_weight=3.0, clean_weight=0.5)(task)
    images, clean = as_input(task.marked.images[:6]), task.clean
    torch.manual_seed(1)
    _, loss = calls[1]["objective"](model, images, task.marked.labels[:6])
    torch.manual_seed(1)
    rows = torch.randint(len(clean), (6,))
    with torch.no_grad():
        output = model.forward_routed(torch.cat([images, as_input(clean.images[rows])]))
    layers = [
        (p * (p / each.gates[:6]).log()).sum(1).mean() for p, each in zip(known, output.routing, strict=True)
    ]
    expected = 3 * sum(layers) / len(layers) + 0.5 * F.cross_entropy(output.logits[6:], clean.labels[rows])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_nothing_but_experts_and_gates_changes() -> None:
    model, task, _ = poisoned_mixture()
    before = copies(model)
    create_defense("rasa", rounds=1, epochs=1)(task)
    moved = changed(before, copies(model))
    assert moved and all(".experts.fc" in name or name.endswith(".router.weight") for name in moved)


def test_the_reference_is_the_mean_over_clean_images_in_any_batches(monkeypatch) -> None:
    model, task, _ = poisoned_mixture()
    with torch.no_grad():
        output = model.forward_routed(as_input(task.clean.images))
    whole = mean_gates(task)
    routing = task.routing
    pieces = lambda model, images: (batch for part in images.split(7) for batch in routing(model, part))  # noqa: E731
    object.__setattr__(task, "routing", pieces)
    for found, again, known in zip(whole, mean_gates(task), output.routing, strict=True):
        torch.testing.assert_close(found, known.gates.mean(0))
        torch.testing.assert_close(found, again)
        torch.testing.assert_close(found.sum(0), torch.ones(found.shape[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: expected an integer of at least 1"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"kl_weight": -1.0}, "kl_weight: expected a number of at least 0"),
        ({"clean_weight": float("inf")}, "clean_weight: expected a number of at least 0"),
        ({"gate_lr": -1.0}, "gate_lr: expected a positive number"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("rasa", **options)


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: expected a mixture of merged experts, got PMoE"):
        create_defense("rasa").check_model(used_model("pmoe"))
