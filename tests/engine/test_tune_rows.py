"""Training some rows of a model: they move, and nothing else does, by a single bit."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model

RECIPES = [
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
]


def assert_only_rows_changed(before, after, rows) -> None:
    assert changed(before, after) == rows.keys()
    for name, (start, stop) in rows.items():
        differs = (before[name] != after[name]).flatten(1).any(1) if before[name].ndim > 1 else None
        differs = before[name] != after[name] if differs is None else differs
        assert differs[start:stop].any(), name
        assert not differs[:start].any() and not differs[stop:].any(), name


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_one_experts_rows_move_and_all_else_stays_bit_for_bit(recipe, index) -> None:
    model = used_model()
    before, expert = copies(model), model.experts()[index]
    task, _ = make_task(model, **recipe)
    task.tune(model, task.clean, epochs=3, rows=expert.own)
    assert_only_rows_changed(before, copies(model), expert.own)
    assert "moe.norm.running_mean" in expert.own and "norm.num_batches_tracked" not in expert.own
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_that_are_a_weight_alone_leave_its_bias_and_the_norms() -> None:
    model = used_model("wide_resnet")
    before, rows = copies(model), {"head.weight": (1, 2)}
    task, _ = make_task(model, name="wide_resnet", weight_decay=0.1)
    task.tune(model, task.clean, epochs=1, rows=rows)
    assert_only_rows_changed(before, copies(model), rows)


def test_all_rows_of_a_part_are_that_part() -> None:
    """With every row of the head free, the outcome is that of training the head."""
    by_rows, by_module = used_model(), used_model()
    for model, chosen in ((by_rows, {"rows": None}), (by_module, {"modules": [by_module.head]})):
        task, _ = make_task(model)
        if "rows" in chosen:
            chosen = {"rows": {f"head.{name}": (0, 3) for name in ("weight", "bias")}}
        task.tune(model, task.clean, epochs=2, **chosen)
    assert not changed(copies(by_rows), copies(by_module))


def test_a_later_call_trains_as_if_there_had_been_no_rows() -> None:
    model = used_model()
    task, _ = make_task(model)
    task.tune(model, task.clean, epochs=1, rows={"head.bias": (0, 1)})
    before = copies(model)
    task.tune(model, task.clean, epochs=1)
    assert {name for name, _ in model.named_parameters() if name.endswith("weight")} <= changed(
        before, copies(model)
    )


def test_a_name_that_is_none_is_refused_before_a_step() -> None:
    model = used_model()
    before, task = copies(model), make_task(model)[0]
    with pytest.raises(
        ValueError, match=r"rows: expected names in the model's state dict, got \['hat\.bias'\]"
    ):
        task.tune(model, task.clean, epochs=1, rows={"hat.bias": (0, 1), "head.bias": (0, 1)})
    assert not changed(before, copies(model)) and not task.tune.history


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
def test_inside_a_cuda_graph_too(recipe) -> None:
    """Enough steps of one size that most of them are replays of a captured graph."""
    from dataclasses import replace

    from defense_tasks import held_images

    gpu = torch.device("cuda")
    model = used_model().to(gpu)
    before, expert = copies(model), model.experts()[1]
    task, _ = make_task(model, **recipe)
    tuner = replace(task.tune, device=gpu)
    tuner(model, held_images().to(gpu), epochs=4, rows=expert.own)
    assert_only_rows_changed(before, copies(model), expert.own)
