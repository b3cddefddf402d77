"""What a model that names its parts keeps to."""

from __future__ import annotations

import copy

import pytest
import torch
from defense_tasks import used_model

from backdoorbench_moe.models import list_models
from backdoorbench_moe.models.base import RoutedModel
from backdoorbench_moe.ops.experts import copy_expert, expert_outputs, mute, replaced_output
from backdoorbench_moe.ops.structure import Structured, WithExperts

NAMES = [name if name != "timm" else "timm:test_resnet" for name in list_models()]


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_the_models_own_and_do_not_overlap(name: str) -> None:
    model = used_model(name)
    if not isinstance(model, Structured):
        pytest.skip("it does not name its parts")
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


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_pruned_lies_in_the_model(name: str) -> None:
    model = used_model(name)
    if not isinstance(model, Structured):
        pytest.skip("it does not name its parts")
    own, prunable = set(model.modules()), model.prunable()
    assert prunable.keys() <= {"experts", "trunk"}
    taken = set()
    for groups in prunable.values():
        for group in groups:
            assert group.conv in own and 0 <= group.start < group.stop <= group.conv.out_channels
            if group.norm is not None:
                assert group.norm in own and group.norm.num_features == group.conv.out_channels
            channels = {(id(group.conv), channel) for channel in range(group.start, group.stop)}
            assert len(channels) == len(group) and not channels & taken
            taken |= channels


def test_pmoe_is_its_trunk_router_experts_and_head() -> None:
    model = used_model("pmoe")
    named = {id(p) for modules in model.components().values() for m in modules for p in m.parameters()}
    rest = {name for name, p in model.named_parameters() if id(p) not in named}
    assert rest and all(name.startswith(("trunk.", "reduce_norm.", "reduce.")) for name in rest)
    experts = model.prunable()["experts"]
    assert [(group.start, group.stop) for group in experts] == [(0, 5), (5, 10), (10, 15), (15, 20)]


def routed_with_experts(name: str) -> RoutedModel:
    model = used_model(name)
    if not isinstance(model, WithExperts):
        pytest.skip("it does not say where its experts lie")
    assert isinstance(model, RoutedModel)
    return model


def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_those_of_the_gates_and_do_not_overlap(name: str) -> None:
    model = routed_with_experts(name)
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


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_muted_expert_has_no_effect_and_any_other_has(name: str) -> None:
    """Whatever comes out of a muted expert, the logits stay; and so they do not for one that is not muted."""
    model = routed_with_experts(name)
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


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_expert_is_its_own_weights(name: str) -> None:
    """With all experts' weights from another model, and the rest as it was, they are that model's experts."""
    model, other = routed_with_experts(name), used_model(name, seed=1)
    mixed = copy.deepcopy(model)
    for expert in model.experts():
        copy_expert(other, mixed, expert)
    own = {key for expert in model.experts() for key in expert.own}
    for key, tensor in mixed.state_dict().items():
        torch.testing.assert_close(tensor, (other if key in own else model).state_dict()[key])
    [gives] = expert_outputs(model.experts()[:1], lambda: model(images()))
    with replaced_output(model.experts()[0], gives):
        torch.testing.assert_close(model(images()), model(images()))
