"""What a model that names its parts keeps to."""

from __future__ import annotations

import copy

import pytest
import torch

from backdoorbench_moe.moe.experts import copy_expert, expert_outputs, mute, replaced_output
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import Structured, WithExperts, channels_of
from backdoorbench_moe.testing.making import batch, used_model


@pytest.mark.only(interface=Structured)
def test_the_parts_are_the_models_own_and_do_not_overlap(model_name: str) -> None:
    model = used_model(model_name)
    assert isinstance(model, Structured)
    own, components = set(model.modules()), model.components()
    assert components.keys() <= {"experts", "router", "head"} and "head" in components
    if isinstance(model, RoutedModel):
        assert len(components) == 3
    seen: set[int] = set()
    for modules in components.values():
        assert modules and set(modules) <= own
        weights = {id(p) for module in modules for p in module.parameters()}
        assert weights and not weights & seen
        seen |= weights


@pytest.mark.only(interface=Structured)
def test_what_can_be_pruned_lies_in_the_model(model_name: str) -> None:
    model = used_model(model_name)
    assert isinstance(model, Structured)
    own, prunable = set(model.modules()), model.prunable()
    assert prunable.keys() <= {"experts", "trunk"}
    taken = set()
    for groups in prunable.values():
        for group in groups:
            count = channels_of(group.layer)
            assert group.layer in own and 0 <= group.start < group.stop <= count
            if group.norm is not None:
                assert group.norm in own and group.norm.num_features == count
            if group.tap is not None:
                assert group.tap in own
            channels = {(id(group.layer), channel) for channel in range(group.start, group.stop)}
            assert len(channels) == len(group) and not channels & taken
            taken |= channels


def routed_with_experts(name: str) -> RoutedModel:
    model = used_model(name)
    assert isinstance(model, RoutedModel) and isinstance(model, WithExperts)
    return model


def images() -> torch.Tensor:
    return batch(4, 3, 32, 32)


@pytest.mark.only(interface=WithExperts)
def test_experts_are_those_of_the_gates_and_do_not_overlap(model_name: str) -> None:
    model = routed_with_experts(model_name)
    experts, state = model.experts(), model.state_dict()
    expected = [
        (routing.layer, e)
        for routing in model.forward_routed(images()).routing
        for e in range(routing.gates.shape[1])
    ]
    assert [(expert.layer, expert.index) for expert in experts] == expected
    taken: set[tuple[str, int]] = set()
    for expert in experts:
        assert expert.output.items() <= expert.own.items() and expert.output
        assert expert.tap in set(model.modules())
        for key, (start, stop) in expert.own.items():
            assert 0 <= start < stop <= len(state[key])
            rows = {(key, row) for row in range(start, stop)}
            assert not rows & taken
            taken |= rows


@pytest.mark.only(interface=WithExperts)
@torch.no_grad()
def test_a_muted_expert_has_no_effect_and_any_other_has(model_name: str) -> None:
    """Whatever comes out of a muted expert, the logits stay; and so they do not for one that is not muted."""
    model = routed_with_experts(model_name)
    first, second = model.experts()[:2]
    mute(model, [first])
    before = model(images())
    [gives, other] = expert_outputs([first, second], lambda: model(images()))
    with replaced_output(first, torch.full_like(gives, 3.0)):
        muted = model(images())
    with replaced_output(second, torch.full_like(other, 3.0)):
        heard = model(images())
    torch.testing.assert_close(muted, before, rtol=0, atol=0)
    assert not torch.allclose(heard, before)


@pytest.mark.only(interface=WithExperts)
@torch.no_grad()
def test_an_expert_is_its_own_weights(model_name: str) -> None:
    """With all experts' weights from another model, and the rest as it was, they are that model's experts."""
    model, other = routed_with_experts(model_name), used_model(model_name, seed=1)
    mixed = copy.deepcopy(model)
    for expert in model.experts():
        copy_expert(other, mixed, expert)
    own = {key for expert in model.experts() for key in expert.own}
    for key, tensor in mixed.state_dict().items():
        torch.testing.assert_close(tensor, (other if key in own else model).state_dict()[key])
    [gives] = expert_outputs(model.experts()[:1], lambda: model(images()))
    with replaced_output(model.experts()[0], gives):
        torch.testing.assert_close(model(images()), model(images()))
