"""Changes to a model that are undone at the end of a block, also after an exception."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe.moe.temporary import evaluation_mode, frozen, hooked, restored


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_hooks_are_removed_after_an_exception(model: nn.Sequential) -> None:
    seen: list[nn.Module] = []
    with (
        pytest.raises(ZeroDivisionError),
        hooked(layer.register_forward_hook(lambda layer, *_: seen.append(layer)) for layer in model),
    ):
        model(torch.ones(4, 2))
        _ = 1 / 0
    assert seen == list(model)
    model(torch.ones(4, 2))
    assert len(seen) == 3


def test_hooks_before_one_that_cannot_be_registered_are_removed(model: nn.Sequential) -> None:
    with (
        pytest.raises(AttributeError),
        hooked(model.get_submodule(name).register_forward_hook(print) for name in ("0", "absent")),
    ):
        pass
    assert not model[0]._forward_hooks


def test_the_mode_of_each_module_is_restored(model: nn.Sequential) -> None:
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        _ = 1 / 0
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_frozen_parameters_require_gradients_again_if_they_did(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen(model.parameters()):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        _ = 1 / 0
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_values_are_restored_bit_for_bit(model: nn.Sequential) -> None:
    weight = model[0].weight
    before, rows = weight.detach().clone(), weight.detach()[1:]
    with pytest.raises(ZeroDivisionError), restored([rows]):
        rows.mul_(1.1)
        assert not torch.equal(weight, before)
        _ = 1 / 0
    assert torch.equal(weight, before)
