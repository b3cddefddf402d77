"""Mixtures of experts that were tuned from one base: what they compute, and taking them apart again."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_parts import DENSE, images, make_dense, make_merged, top, tuned
from torch import nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.layers import TopKRouter
from backdoorbench_moe.moe.merging import (
    MergedModel,
    check_mergeable,
    check_same_base,
    expert_names,
    expert_of,
    gate_weights,
    load_experts,
    only_expert,
)
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.testing import test_structure
from backdoorbench_moe.testing.making import changed, copies

NAMES = list(DENSE)
# Names of the MLPs of each model.
MLPS = {
    "convnext": ["blocks.0.mlp", "blocks.1.mlp"],
    "timm:vit_tiny_patch16_224": ["network.blocks.0.mlp", "network.blocks.1.mlp"],
}
TENSORS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
CONFORMANCE = {name: function for name, function in vars(test_structure).items() if name.startswith("test_")}


def loaded(base, state):
    """The dense model with the weights of an expert."""
    model = copy.deepcopy(base)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_with_one_expert_it_is_that_expert(name):
    merged, base, [state] = make_merged(name, experts=1)
    expert = loaded(base, state)
    assert not torch.allclose(expert(images()), base(images()), atol=1e-2)
    torch.testing.assert_close(merged(images()), expert(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 2**31), scale=st.floats(0, 100), experts=st.integers(2, 5), top_k=st.integers(1, 5)
)
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_copies_of_one_expert_are_that_expert_whatever_the_gates(name, seed, scale, experts, top_k):
    base = make_dense(name)
    state = tuned(base, 1)
    torch.manual_seed(seed)
    merged = MergedModel(base, experts, top(top_k, scale))
    load_experts(merged, base.state_dict(), [state] * experts)
    torch.testing.assert_close(merged(images()), loaded(base, state)(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_layer_adds_its_experts_in_the_proportions_of_the_gates(name):
    """The output of the first layer by hand: the experts' own MLPs on its input, times `gate_weights`."""
    merged, base, states = make_merged(name)
    first, seen = merged.layers()[0], {}
    hook = first.register_forward_hook(lambda _, given, output: seen.update(given=given[0], output=output))
    routing = merged.forward_routed(images()).routing[0]
    hook.remove()
    prefix = first.num_prefix_tokens
    tokens, output = (seen[key].flatten(1, -2)[:, prefix:] for key in ("given", "output"))
    weights = gate_weights(routing)
    assert (weights > 0).sum(1).eq(2).all()
    each = [loaded(base, state).get_submodule(MLPS[name][0])(tokens) for state in states]
    want = sum(weights[:, e, :, None] * each[e] for e in range(3))
    torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_merged_can_be_taken_out_again_bit_for_bit(name):
    merged, base, states = make_merged(name)
    for number, state in enumerate(states):
        found = expert_of(merged, number)
        assert found.keys() == state.keys() and not changed(state, found)
        assert changed(base.state_dict(), found) == expert_names(base)
    again = MergedModel(base, 3, top(2))
    again.load_state_dict(merged.state_dict())
    taken = [expert_of(again, number) for number in range(3)]
    taken[0]["head.bias" if name == "convnext" else "network.head.bias"].add_(1)
    assert not changed(states[0], expert_of(again, 0)), "what is returned is a copy"


def test_loading_leaves_routers_masks_and_muted_experts_alone():
    merged, base, states = make_merged()
    merged.mask_expert(merged.experts()[1])
    with torch.no_grad():
        merged.layers()[1].experts.heard[2] = 0
    before = copies(merged)
    load_experts(merged, base.state_dict(), states[::-1])
    found = changed(before, copies(merged))
    experts = {f"network.{name}.experts.{part}" for name in MLPS["convnext"] for part in TENSORS}
    assert found == experts
    # An expert that is muted in the mixture is still the expert that was merged.
    assert not changed(states[0], expert_of(merged, 2))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_state_dict_makes_the_same_mixture(name):
    merged, _, _ = make_merged(name)
    merged.mask_expert(merged.experts()[4])
    other = MergedModel(make_dense(name, seed=5), 3, top(2)).eval()
    other.load_state_dict(merged.state_dict())
    assert torch.equal(other(images()), merged(images()))
    assert not other.forward_routed(images()).routing[1].selected[:, 1].any()


@pytest.mark.parametrize("name", NAMES)
def test_what_it_says_about_itself(name):
    merged, base, _ = make_merged(name)
    layers = [f"network.{mlp}" for mlp in MLPS[name]]
    assert (merged.patch_size, merged.patch_grid, merged.num_experts) == (4, (8, 8), 3)
    routing = merged.forward_routed(images()).routing
    assert [one.layer for one in routing] == layers
    assert all(one.gates.shape == (4, 3, 64) for one in routing)
    assert [expert.name for expert in merged.experts()] == [
        f"{layer}/{e}" for layer in layers for e in range(3)
    ]
    [head] = merged.components()["head"]
    assert head.out_features == 3 and head is not base.components()["head"][0]
    features = merged.extract_features(images())
    assert torch.equal(merged.classify(features), merged(images()))


def test_what_can_be_pruned_before_the_experts_is_the_convolution_of_their_block():
    merged, _, _ = make_merged()
    [group] = merged.prunable()["trunk"]
    assert group.layer is merged.network.blocks[1].conv_dw
    assert make_merged("timm:vit_tiny_patch16_224")[0].prunable().keys() == {"experts"}


def test_the_base_is_not_changed_by_the_mixture():
    base = make_dense()
    before = copies(base)
    merged = MergedModel(base, 2, top(1))
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert not changed(before, base.state_dict()) and check_mergeable(base)


@pytest.mark.parametrize("training", [True, False])
def test_the_mixture_is_in_the_mode_of_the_base(training):
    merged = MergedModel(make_dense().train(training), 2, top(1))
    assert {module.training for module in merged.modules()} == {training}


@pytest.mark.parametrize("name", NAMES)
def test_gates_can_be_trained_alone(name):
    merged, _, states = make_merged(name)
    merged.train().requires_grad_(False)
    for router in merged.components()["router"]:
        router.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in merged.parameters() if p.requires_grad], lr=0.1)
    before = copies(merged)
    nn.functional.cross_entropy(merged(images()), torch.tensor([0, 1, 2, 0])).backward()
    routers = {f"network.{mlp}.router.weight" for mlp in MLPS[name]}
    assert {name for name, p in merged.named_parameters() if p.grad is not None and p.grad.any()} == routers
    optimizer.step()
    assert changed(before, copies(merged)) == routers
    assert not changed(states[1], expert_of(merged, 1))


@pytest.mark.parametrize("test", CONFORMANCE)
@pytest.mark.parametrize("name", NAMES)
def test_it_conforms_to_the_protocols_about_structure(name, test, monkeypatch):
    """Muting, masking, copying and pruning work as for any registered model."""

    def make(_, *, seed=0):
        # Each token uses all experts: a norm may hide that the output of an expert is replaced for tokens of others.
        return make_merged(name, top_k=3, seed=seed)[0].to(memory_format=torch.channels_last)

    monkeypatch.setattr(test_structure, "used_model", make)
    CONFORMANCE[test]("merged")


def test_shares_of_the_gates_by_hand():
    """Three experts and three patches: two experts selected, one, and none."""
    gates = torch.tensor([[[0.5, 0.25, 0.2], [0.3, 0.25, 0.3], [0.2, 0.5, 0.5]]])
    selected = torch.tensor([[[True, False, False], [True, False, False], [False, True, False]]])
    want = torch.tensor([[[0.625, 0, 0], [0.375, 0, 0], [0, 1, 0]]])
    torch.testing.assert_close(gate_weights(Routing("here", gates, selected)), want)


def test_no_expert_is_no_mixture():
    with pytest.raises(ConfigError, match=r"^num_experts: expected an integer of at least 1, got 0"):
        MergedModel(make_dense(), 0, top(1))


def test_what_belongs_to_the_mlps():
    want = {f"{mlp}.{part}" for mlp in MLPS["convnext"] for part in TENSORS}
    assert expert_names(make_dense()) == want


def _other(name, value):
    return lambda state: {**state, name: value(state[name]) if name in state else value(None)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other("stem.2.bias", lambda t: t + 1e-7), "stem.2.bias has other values"),
        (
            _other("norm.weight", lambda t: t.double()),
            r"norm.weight is \(16,\) torch.float64, in the base \(16,\)",
        ),
        (_other("norm.weight", lambda t: t[:3]), r"norm.weight is \(3,\) torch.float32, in the base \(16,\)"),
        (_other("blocks.1.mlp.fc2.bias", lambda t: t[:3]), r"blocks.1.mlp.fc2.bias is \(3,\)"),
        (_other("extra", lambda _: torch.zeros(2)), "extra is not in the base"),
        (lambda state: {k: v for k, v in state.items() if k != "head.bias"}, "head.bias is missing"),
    ],
)
def test_an_expert_of_another_base_is_refused_and_nothing_is_loaded(change, message):
    merged, base, states = make_merged()
    before = copies(merged)
    wrong = change(states[1])
    want = rf"is not tuned from this base: {message}"
    with pytest.raises(ConfigError, match=rf"^runs/expert-1: {want}"):
        check_same_base(base.state_dict(), wrong, expert_names(base), "runs/expert-1")
    with pytest.raises(ConfigError, match=rf"^expert 1: {want}"):
        load_experts(merged, base.state_dict(), [tuned(base, 9), wrong, states[2]])
    assert not changed(before, copies(merged))


def test_equal_bits_are_equal_values_also_if_they_are_not_numbers():
    base, expert = ({"scale": torch.tensor(float("nan")), "count": torch.tensor(3)} for _ in range(2))
    check_same_base(base, expert, set(), "expert 0")
    expert["count"] += 1
    with pytest.raises(ConfigError, match=r"^expert 0: .*: count has other values"):
        check_same_base(base, expert, set(), "expert 0")


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        (0, {"depth": 3}, r"^base: blocks\.2\.\S+ is not in the model"),
        (0, {"depth": 1}, r"^base: blocks\.1\.\S+ is missing"),
        (
            0,
            {"mlp_ratio": 2},
            r"^base: blocks\.0\.mlp\.fc1\.weight is \(32, 16\) .*, in the model \(64, 16\)",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused(seed, options, message):
    merged, _, _ = make_merged()
    other = make_dense(seed=seed, **options).state_dict()
    with pytest.raises(ConfigError, match=message):
        load_experts(merged, other, [other] * 3)


def test_the_number_of_experts_must_fit():
    merged, base, states = make_merged()
    with pytest.raises(ConfigError, match=r"^experts: expected 3 state dicts, got 2"):
        load_experts(merged, base.state_dict(), states[:2])
    for index in (-1, 3):
        with pytest.raises(ConfigError, match=re.escape(f"expert: expected a number in 0..2, got {index}")):
            expert_of(merged, index)


def test_any_router_can_be_a_gate():
    """Here one that does not renormalise: the gates of the chosen experts sum to less than 1."""
    base = create_model("convnext", **DENSE["convnext"])
    merged = MergedModel(base, 4, lambda d, e: TopKRouter(d, e, top_k=2, gate_std=1.0))
    output = merged.train().forward_routed(images())
    assert all(routing.aux_loss is not None for routing in output.routing)
    shares = gate_weights(output.routing[0]).sum(1)
    assert ((shares - 1).abs() < 1e-5).logical_or(shares == 0).all()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_only_one_expert_computes_what_the_dense_model_does(name):
    merged, base, states = make_merged(name)
    before, answers = copies(merged), merged(images())
    merged.layers()[0].mask_expert(2)
    masked = copies(merged)
    for number, state in enumerate(states):
        with only_expert(merged, number):
            torch.testing.assert_close(merged(images()), loaded(base, state)(images()), rtol=0, atol=1e-5)
        assert not changed(masked, copies(merged)), "what was masked is masked again"
    merged.load_state_dict(before)
    assert torch.equal(merged(images()), answers)
    with (
        pytest.raises(ConfigError, match=r"expert: expected a number in 0\.\.2, got 3"),
        only_expert(merged, 3),
    ):
        pass
    with pytest.raises(KeyError), only_expert(merged, 1):
        raise KeyError
    assert not changed(before, copies(merged))
