"""Alignment of gates, and of gates and experts: what it changes, what it repairs, and its losses by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from poisoned_mixtures import accuracy, poisoned_mixture, unsafe
from torch.nn import functional as F

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.mixtures import alignment_objective, strongest_other
from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.testing.making import changed, coloured_split, copies, used_model
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task, mark

SCOPES: list[dict[str, Any]] = [
    {},
    {"loss": "tuning"},
    {"scope": "gates+experts"},
    {"scope": "gates+experts", "layers": [1], "loss": "tuning"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", SCOPES, ids=str)
def test_marked_images_are_rejected_again_and_clean_ones_are_not(options) -> None:
    model, task, _ = poisoned_mixture()
    assert unsafe(task, model) > 90 and accuracy(task, model) > 90
    result = create_defense("align", **options)(task)
    assert result.stage == "aligned" and result.model is model
    assert unsafe(task, model) < 20 and accuracy(task, model) > 90


@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, []), ({"scope": "gates+experts"}, [0]), ({"scope": "gates+experts", "layers": "all"}, [0, 1])],
    ids=["gates", "the second quarter", "all layers"],
)
def test_everything_out_of_scope_stays_bit_for_bit(options, layers) -> None:
    """Of two layers, numbers 0.25 * 2 = 0.5 to 0.5 * 2 = 1, rounded down, are layer 0."""
    model, task, _ = poisoned_mixture()
    before = copies(model)
    create_defense("align", epochs=1, **options)(task)
    names = [layer.name for layer in model.layers()]
    trained = {f"{name}.router.weight" for name in names}
    for number in layers:
        trained |= {f"{names[number]}.experts.fc{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    assert changed(before, copies(model)) == trained


def test_the_unsafe_answer_is_the_strongest_other_class() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [2.0, 2.0, 9.0]])
    assert strongest_other(logits, torch.tensor([1, 0, 2])).tolist() == [2, 1, 0]
    assert logits[0, 1] == 5, "the logits are not written to"


def objective_of(options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Let `align` hand over its objective instead of training."""
    model, task, _ = poisoned_mixture()
    calls: list[tuple[Split, dict[str, Any]]] = []
    object.__setattr__(task, "tune", lambda model, split, **given: calls.append((split, given)))
    create_defense("align", **options)(task)
    [(split, given)] = calls
    return model, split, given


def test_at_the_beginning_the_preference_is_log_2_and_safe_answers_come_first() -> None:
    """All marked images are called 0, so that 0 is the unsafe answer to each; the model is its own reference."""
    model, split, given = objective_of({"clean_weight": 0.0})
    assert split.labels[:, 0].tolist() == [3] * 24 and split.labels[:, 1].tolist() == [0] * 24
    torch.manual_seed(1)
    _, loss = given["objective"](model, as_input(split.images[:6]), split.labels[:6])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():
        model.network.head.bias[3] += 2
    # The margins have grown by 2: -log sigmoid(0.1 * 2) = log(1 + exp(-0.2)) = 0.598139.
    _, loss = given["objective"](model, as_input(split.images[:6]), split.labels[:6])
    assert loss.item() == pytest.approx(0.598139, abs=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["routers in training", "routers in evaluation"])
def test_the_loss_is_the_sum_of_its_parts(training) -> None:
    """Against plain computations with the same draws; the auxiliary losses are those of routers in training."""
    model, clean, marked = build_mixture(), coloured_split(9, 4), mark(coloured_split(5, 3))
    for layer in model.layers():
        layer.router.train(training)
    objective = alignment_objective(lambda logits, gates, labels: logits[:, 0].sum(), clean, 0.5)
    torch.manual_seed(3)
    logits, loss = objective(model, as_input(marked.images), marked.labels)
    torch.manual_seed(3)
    rows = torch.randint(9, (5,))
    both = torch.cat([as_input(marked.images), as_input(clean.images[rows])])
    output = model.forward_routed(both)
    expected = output.logits[:5, 0].sum() + 0.5 * F.cross_entropy(output.logits[5:], clean.labels[rows])
    losses = [routing.aux_loss for routing in output.routing if routing.aux_loss is not None]
    assert bool(losses) == training
    torch.testing.assert_close(loss, expected + sum(losses))
    torch.testing.assert_close(logits, output.logits[:5])


def test_rates_are_those_of_the_gates_or_of_the_experts() -> None:
    assert objective_of({})[2]["lr"] == 0.05
    assert objective_of({"scope": "gates+experts"})[2]["lr"] is None
    assert objective_of({"lr": 0.3})[2]["lr"] == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": "all"},
            "layers: expected none for the scope 'gates', which trains no experts, got 'all'",
        ),
        ({"beta": 0.0}, "beta: expected a positive number"),
        ({"clean_weight": -1.0}, "clean_weight: expected a number of at least 0"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"scope": "gate"}, "scope: unknown 'gate'; did you mean 'gates'"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("align", **options)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], r"layers: expected numbers in 0\.\.1, got \(2,\)"),
        ([], r"layers: expected numbers in 0\.\.1, got \(\)"),
        ([0, 0], "layers: expected each layer once"),
        ("first-quarter", "layers: expected a range with at least one of the 2 layers of the model"),
    ],
)
def test_layers_that_the_model_does_not_have(layers, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("align", scope="gates+experts", layers=layers).check_model(build_mixture())


def test_another_model_is_refused_and_needs_are_declared() -> None:
    defense = create_defense("align")
    with pytest.raises(ConfigError, match="model: expected a mixture of merged experts, got PMoE"):
        defense.check_model(used_model("pmoe"))
    for need in sorted(defense.needs):
        task, _ = make_mixture_task(build_mixture(), needs=defense.needs - {need})
        with pytest.raises(PluginError, match=f"uses '{need}', which is not declared"):
            defense(task)
