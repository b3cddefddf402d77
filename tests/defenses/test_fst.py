"""FST: the head is drawn anew, keeps its norm, and stays away from what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model
from torch import nn
from torch.nn import functional as F

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.fst import Shift
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.testing.mixtures import build_mixture

MATRICES = {"head": ("head.weight",), "router": ("moe.router.weight",)}
MATRICES["head+router"] = MATRICES["head"] + MATRICES["router"]


def test_norms_and_likeness_by_hand() -> None:
    """Of (1, 0) and (3, 4), the first gets the norm 5 and then has the product 15 with the second."""
    shift = Shift([nn.Parameter(torch.tensor([[1.0, 0.0]]))], [torch.tensor([[3.0, 4.0]])])
    assert shift.likeness().item() == pytest.approx(3)
    shift.keep_norms()
    assert shift.matrices[0].tolist() == [[5, 0]]
    assert shift.likeness().item() == pytest.approx(15)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_matrix_of_zeros_stays_zero_however_long_the_original_is(size) -> None:
    shift = Shift([nn.Parameter(torch.zeros(2, 2))], [torch.full((2, 2), size)])
    shift.keep_norms()
    assert torch.equal(shift.matrices[0].detach(), torch.zeros(2, 2))


@pytest.mark.parametrize("reset", MATRICES)
def test_what_is_reset_is_drawn_anew_and_keeps_its_norm(reset) -> None:
    model = used_model()
    before = copies(model)
    task, reported = make_task(model)
    result = create_defense("fst", reset=reset, epochs=2)(task)
    [(stage, drawn)], after, fresh = reported, copies(model), task.fresh().state_dict()
    assert (stage, result.stage) == ("reset", "tuned")
    for name in MATRICES[reset]:
        direction = fresh[name] / fresh[name].norm()
        torch.testing.assert_close(drawn[name], direction * before[name].norm())
        torch.testing.assert_close(after[name].norm(), before[name].norm())
    own = {name for name in before if name.startswith(tuple(n.rpartition(".")[0] for n in MATRICES[reset]))}
    assert changed(before, drawn) <= own
    weights = {name for name, _ in model.named_parameters() if name.endswith("weight")}
    assert weights <= changed(before, after), "everything is tuned"


def test_the_loss_is_that_of_tuning_plus_the_product_with_the_original() -> None:
    model = used_model()
    original, given = model.head.weight.detach().clone(), {}
    task, _ = make_task(model)
    create_defense("fst", alpha=0.3)(replace(task, tune=lambda *_, **options: given.update(options)))
    images, labels = as_input(task.clean.images), task.clean.labels
    # As after a step: the norm is restored before the next one.
    with torch.no_grad():
        model.head.weight.mul_(7)
    logits, loss = given["objective"](model, images, labels)
    torch.testing.assert_close(model.head.weight.norm(), original.norm())
    expected = F.cross_entropy(model(images), labels) + 0.3 * (model.head.weight * original).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, model(images))


def test_the_head_turns_away_from_what_it_was() -> None:
    cosines = []
    for alpha in (0.0, 3.0):
        model = used_model()
        original = model.head.weight.detach().clone()
        create_defense("fst", alpha=alpha, epochs=3)(make_task(model)[0])
        cosines.append(F.cosine_similarity(model.head.weight.flatten(), original.flatten(), dim=0).item())
    assert cosines[1] < -0.5 < cosines[0]


def test_parts_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="model: expected a model with a router, WideResNet has none"):
        create_defense("fst", reset="head+router").check(used_model("wide_resnet"))
    create_defense("fst", reset="head+router").check(build_mixture())
    with pytest.raises(ConfigError, match=r"alpha: expected a number of at least 0, got -1"):
        create_defense("fst", alpha=-1)
