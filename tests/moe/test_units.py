"""Masks of channels, experts and gates against models that are changed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from defense_tasks import changed, copies, used_model
from torch import nn
from torch.func import functional_call

from backdoorbench_moe.moe.experts import mute
from backdoorbench_moe.moe.units import (
    Units,
    expert_ranges,
    expert_units,
    gate_units,
    masked_tensors,
    norm_units,
    prune,
)
from backdoorbench_moe.testing.mixtures import build_mixture

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def with_masks(model: nn.Module, *masks: tuple[Units, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return functional_call(model, masked_tensors(model, masks), (IMAGES,))


def test_channels_are_those_of_all_norms_with_a_scale() -> None:
    model = used_model("preact_resnet18")
    sizes = {units.layer: len(units) for units in norm_units(model)}
    assert sizes == {n: m.num_features for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    layers = [units.layer for units in norm_units(build_mixture())]
    assert layers == ["network.stem.3", "network.blocks.0.norm", "network.blocks.1.norm", "network.norm"]
    assert not norm_units(nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Linear(3, 2)))


@pytest.mark.parametrize("build", [used_model, build_mixture], ids=["pmoe", "mixture"])
def test_masks_of_one_change_nothing_and_masks_of_zero_are_pruning(build) -> None:
    model = build()
    plain = model(IMAGES).detach()
    every = [*norm_units(model), *expert_units(model), *gate_units(model)]
    assert {units.kind for units in every} == {"channel", "expert", "gate"}
    torch.testing.assert_close(with_masks(model, *((u, torch.ones(len(u))) for u in every)), plain)
    before = copies(model)
    for units in every:
        mask = torch.ones(len(units))
        mask[1] = 0
        masked = with_masks(model, (units, mask))
        assert not changed(before, copies(model)), "only the masked model is another one"
        pruned = copy.deepcopy(model)
        prune(pruned, units, [1])
        torch.testing.assert_close(masked, pruned(IMAGES).detach(), msg=f"{units.kind} of {units.layer}")
        assert changed(before, copies(pruned)) <= set(units.rows)


def test_a_pruned_expert_is_a_muted_one() -> None:
    model = used_model()
    [units] = expert_units(model)
    assert units.names == ("moe/0", "moe/1", "moe/2", "moe/3")
    other = copy.deepcopy(model)
    prune(model, units, [2])
    mute(other, [other.experts()[2]])
    assert not changed(copies(model), copies(other))


def test_experts_without_effect_are_no_units() -> None:
    """Their masks would stay 1, and one of them would be the expert that a layer keeps."""
    model = used_model()
    mute(model, [model.experts()[2]])
    [units] = expert_units(model)
    assert units.names == ("moe/0", "moe/1", "moe/3")
    assert units.rows["moe.conv.bias"].tolist() == [0] * 5 + [1] * 5 + [3] * 5 + [2] * 5
    mute(model, model.experts())
    assert expert_units(model) == []


def test_half_a_mask_on_every_kind_of_tensor_by_hand() -> None:
    model = used_model()
    nn.init.normal_(model.norm.bias)
    [gates] = gate_units(model)
    [scale] = [units for units in norm_units(model) if units.layer == "norm"]
    mask = torch.tensor([1.0, 0.5, 1.0, 0.25])
    found = masked_tensors(model, [(gates, mask)], {"norm": torch.full((20,), 3.0)})
    torch.testing.assert_close(found["moe.router.weight"], model.moe.router.weight.detach() * mask[:, None])
    torch.testing.assert_close(found["norm.bias"], model.norm.bias.detach() * 3)
    [experts] = expert_units(model)
    both = masked_tensors(model, [(scale, torch.full((20,), 0.5)), (experts, mask)])
    expected = model.norm.weight.detach() * 0.5 * mask.repeat_interleave(5)
    torch.testing.assert_close(both["norm.weight"], expected)
    both = masked_tensors(model, [(experts, mask)], {"norm": torch.full((20,), 3.0)})
    torch.testing.assert_close(both["norm.bias"], model.norm.bias.detach() * 3 * mask.repeat_interleave(5))


def test_gradients_reach_the_masks_and_not_the_model() -> None:
    model = used_model()
    every = [*norm_units(model), *expert_units(model), *gate_units(model)]
    masks = [torch.ones(len(units), requires_grad=True) for units in every]
    tensors = masked_tensors(model, list(zip(every, masks, strict=True)))
    loss = functional_call(model, tensors, (IMAGES,)).square().sum()
    gradients = torch.autograd.grad(loss, masks)
    assert all(gradient.any() for gradient in gradients)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranges_of_experts() -> None:
    model = used_model()
    assert expert_ranges(model, "norm.weight") == [(f"moe/{e}", 5 * e, 5 * e + 5) for e in range(4)]
    assert expert_ranges(model, "reduce.weight") == []
    assert expert_ranges(used_model("wide_resnet"), "norm.weight") == []


def test_a_dense_model_has_neither_experts_nor_gates_and_slots_are_no_gates(monkeypatch) -> None:
    dense = used_model("wide_resnet")
    assert expert_units(dense) == [] and gate_units(dense) == [] and norm_units(dense)
    model = used_model()
    experts = model.experts()
    monkeypatch.setattr(type(model), "experts", lambda self: experts)
    model.moe.router.weight = nn.Parameter(torch.ones(8, 8))  # Two rows an expert, as slots are.
    assert gate_units(model) == [] and expert_units(model)
