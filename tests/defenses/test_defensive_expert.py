"""The defensive expert: which expert, what of it is trained, and what it repairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poisoned_mixtures import POISONED, accuracy, poisoned_mixture, unsafe

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.steps import PREFERENCE_LR_SHARE
from backdoorbench_moe.testing.making import changed, copies, used_model
from backdoorbench_moe.testing.mixtures import build_mixture

FAST: dict[str, Any] = {"preference_epochs": 1, "epochs": 1, "gate_epochs": 1}


def test_marked_images_go_to_the_defensive_expert_and_new_gates_alone_do_not_help() -> None:
    model, task, _ = poisoned_mixture()
    create_defense("router-reset")(task)
    assert unsafe(task, model) > 60
    model, task, _ = poisoned_mixture()
    result = create_defense("defensive-expert")(task)
    assert unsafe(task, model) < 20 and accuracy(task, model) > 90
    [judged] = result.judgements
    assert judged.scores == {"0": 0.0, "1": 100.0} and judged.details == {"defensive": 0}


@pytest.mark.parametrize("gate", ["top-k", "sample-top1", "soft"])
@pytest.mark.parametrize("expert", [0, POISONED])
def test_only_its_own_rows_change_and_then_only_the_gates(gate, expert) -> None:
    model, task, reported = poisoned_mixture(gate)
    before = copies(model)
    create_defense("defensive-expert", expert=expert, **FAST)(task)
    [(stage, tuned)] = reported
    after, moved = copies(model), changed(before, tuned)
    own = {name: rows for each in model.experts() if each.index == expert for name, rows in each.own.items()}
    assert stage == "expert tuned" and moved == {name for name in own if not name.endswith(".heard")}
    for name in moved:
        start, stop = own[name]
        assert torch.equal(before[name][:start], tuned[name][:start]), name
        assert torch.equal(before[name][stop:], tuned[name][stop:]), name
    assert {name.split(".router.")[1] for name in changed(tuned, after)} <= {"weight", "step"}
    assert not any(layer.router.masked.any() for layer in model.layers())


def test_an_expert_that_no_gate_can_choose_is_not_the_defensive_one() -> None:
    model, task, _ = poisoned_mixture()
    for expert in model.experts():
        if expert.index == 0:
            model.mask_expert(expert)
    [judged] = create_defense("defensive-expert", **FAST)(task).judgements
    assert judged.scores == {"0": 0.0, "1": 100.0} and judged.details == {"defensive": 1}


def test_gates_are_drawn_anew_from_the_defenders_seed() -> None:
    """With a learning rate of nearly 0 they are those of the fresh model."""
    model, task, _ = poisoned_mixture()
    create_defense("defensive-expert", gate_lr=1e-12, **FAST)(task)
    for own, drawn in zip(model.layers(), task.fresh().layers(), strict=True):
        torch.testing.assert_close(own.router.weight, drawn.router.weight, rtol=0, atol=1e-6)


def test_what_is_trained_on_what() -> None:
    """Step 1: all marked images, safe against unsafe answers. Step 2: the expert's own task. Then all tasks."""
    _, task, _ = poisoned_mixture()
    calls = []

    def tune(model, split, **given) -> None:
        alone = [int((~layer.router.masked).sum()) for layer in model.layers()]
        calls.append((split, given, alone))

    object.__setattr__(task, "tune", tune)
    options = {"preference_epochs": 2, "epochs": 3, "gate_epochs": 4, "lr": 0.5}
    create_defense("defensive-expert", expert=1, **options)(task)
    (first, one, alone), (second, two, _), (third, three, all_of_them) = calls
    assert torch.equal(first.images, task.marked.images) and first.labels[:, 0].tolist() == [3] * 24
    assert first.labels[:, 1].tolist() == [0] * 24, "what the poisoned expert answers"
    assert second is task.tasks[1] and len(third) == sum(map(len, task.tasks))
    assert [one["epochs"], two["epochs"], three["epochs"]] == [2, 3, 4]
    # A share of the experts' rate of 0.01, the given one, and that of the gates.
    assert [one["lr"], two["lr"], three["lr"]] == [PREFERENCE_LR_SHARE * 0.01, 0.5, 0.05]
    assert alone == [1, 1] and all_of_them == [2, 2] and one["rows"] == two["rows"] and "rows" not in three
    create_defense("defensive-expert", preference_epochs=0)(task)
    assert len(calls) == 5, "step 1 is left out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": 2}, r"expert: expected a number in 0\.\.1, got 2"),
        ({"expert": -1}, r"expert: expected a number in 0\.\.1, got -1"),
        ({"layers": [0]}, r"layers: expected numbers in 1\.\.1 \(the input of layer 0 cannot change\)"),
    ],
)
def test_what_the_mixture_does_not_have(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("defensive-expert", **options).check_model(build_mixture())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preference_beta": 0.0}, "preference_beta: expected a positive number"),
        ({"safe_weight": -1.0}, "safe_weight: expected a number of at least 0"),
        ({"similarity": -1.0}, "similarity: expected a number of at least 0"),
        ({"preference_epochs": -1}, "preference_epochs: expected an integer of at least 0"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"gate_epochs": 0}, "gate_epochs: expected an integer of at least 1"),
        ({"gate_lr": 0.0}, "gate_lr: expected a positive number"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("defensive-expert", **options)


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: expected a mixture of merged experts, got PMoE"):
        create_defense("defensive-expert").check_model(used_model("pmoe"))
