"""Conformance tests of gates.

An option `top_k`, if a gate has one, is the number of experts for each token, 1 to E.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.moe.layers import MLPExperts, Router, RouterOutput, SparseMoELayer
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import changed, copies, make, tiny_options

IMAGES, TOKENS, FEATURES, EXPERTS = 3, 12, 16, 4

both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def build_gate(name: str, num_experts: int = EXPERTS) -> Gate:
    """Build a gate for a number of experts, which may be smaller than its `top_k`."""
    gate: Gate
    if (option := REGISTRIES["gate"].options(name).get("top_k")) is None:
        gate = make("gate", name)
    else:
        top_k = tiny_options("gate", name).get("top_k", option.default)
        assert isinstance(top_k, int)
        gate = make("gate", name, top_k=min(top_k, num_experts))
    return gate


def build_router(name: str, num_experts: int = EXPERTS, *, seed: int = 0) -> Router:
    """Build a router with its initial weights, or with weights set from hidden states."""
    gate = build_gate(name, num_experts)
    with seeded(seed, "gates"):
        router = gate(FEATURES, num_experts)
    if not gate.trained:
        gate.set_from_states(router, orthogonal_states(num_experts))
    return router


def orthogonal_states(num_experts: int = EXPERTS) -> Tensor:
    """Return mean hidden states (E, D): each task has a separate feature."""
    return 3 * torch.eye(num_experts, FEATURES)


def make_tokens(seed: int = 0) -> Tensor:
    """Return normal values (B, N, D) that bfloat16 represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGES, TOKENS, FEATURES, generator=generator).bfloat16().float()


def route(router: Router, tokens: Tensor, *, training: bool, seed: int = 0) -> RouterOutput:
    """Route tokens, with torch's global generator seeded."""
    with seeded(seed, "routing"):
        routed: RouterOutput = router.train(training)(tokens)
    return routed


def weights_of(routed: RouterOutput) -> Tensor:
    """Return the weights of the experts' outputs as a table (S, E)."""
    pairs, table = routed.assignment, torch.zeros_like(routed.gates.detach()).flatten(0, 1)
    return table.index_put((pairs.tokens, pairs.experts), pairs.weights.detach(), accumulate=True)


def same_routing(one: RouterOutput, other: RouterOutput) -> bool:
    return torch.equal(one.selected, other.selected) and torch.equal(weights_of(one), weights_of(other))


def build_layer(router: Router, *, copies: bool) -> SparseMoELayer:
    """Return an MoE layer of small experts, all equal or all different."""
    torch.manual_seed(1)
    experts = MLPExperts(
        nn.Linear(FEATURES, 8),
        nn.GELU(),
        nn.Linear(8, FEATURES),
        num_experts=len(router.masked),
        copies=copies,
    )
    return SparseMoELayer(experts, router, name="layer")


def test_the_seed_decides_the_weights(gate_name: str) -> None:
    first = copies(build_router(gate_name))
    torch.rand(1)
    assert not changed(first, copies(build_router(gate_name))), (
        "draws at random, but not from torch's generator"
    )
    if build_gate(gate_name).trained:
        assert changed(first, copies(build_router(gate_name, seed=1))), "the weights are always the same"


@both_modes
def test_the_seed_decides_the_routing(gate_name: str, training: bool) -> None:
    router, tokens = build_router(gate_name), make_tokens()
    state = copies(router)
    first = route(router, tokens, training=training)
    assert torch.equal(tokens, make_tokens()), "the tokens were written to"
    router.load_state_dict(state)
    again = route(router, tokens, training=training)
    assert same_routing(again, first), "draws at random, but not from torch's generator"


@both_modes
def test_the_parts_of_the_output_agree(gate_name: str, training: bool) -> None:
    router = build_router(gate_name)
    routed = route(router, make_tokens(), training=training)
    shape, pairs = (IMAGES, TOKENS, EXPERTS), routed.assignment
    assert routed.gates.shape == shape and routed.gates.dtype == torch.float32
    assert routed.gates.min() >= 0 and routed.gates.max() <= 1
    assert routed.selected.shape == shape and routed.selected.dtype == torch.bool
    assert routed.selected.any(-1).all(), "a token is sent to no expert"
    assert torch.equal(pairs.experts, pairs.experts.sort().values), "the pairs are not sorted by expert"
    assert torch.equal(pairs.experts.bincount(minlength=EXPERTS), pairs.counts)
    keys = pairs.tokens * EXPERTS + pairs.experts
    assert keys.unique().numel() == keys.numel(), "a pair occurs twice"
    weights = weights_of(routed)
    assert not weights[~routed.selected.flatten(0, 1)].any(), "an expert that is not selected has a weight"
    assert ((weights != 0).sum(0) <= pairs.capacity).all()
    loss = routed.aux_loss
    assert loss is None or (training and loss.ndim == 0 and loss.isfinite()), (
        "only training has an auxiliary loss"
    )


def test_weights_sum_to_one_in_evaluation(gate_name: str) -> None:
    weights = weights_of(route(build_router(gate_name), make_tokens(), training=False))
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


def test_weights_sum_to_at_most_one_in_training(gate_name: str) -> None:
    weights = weights_of(route(build_router(gate_name), make_tokens(), training=True))
    assert weights.min() >= 0 and weights.sum(1).max() <= 1 + 1e-5


def test_equal_experts_give_what_one_gives(gate_name: str) -> None:
    layer = build_layer(build_router(gate_name), copies=True).eval()
    tokens = make_tokens()
    want = layer.experts(tokens.view(1, -1, FEATURES).expand(EXPERTS, -1, -1))[0]
    torch.testing.assert_close(layer(tokens), want.view_as(tokens), atol=1e-5, rtol=1e-5)


def test_a_single_expert(gate_name: str) -> None:
    router, tokens = build_router(gate_name, 1), make_tokens()
    route(router, tokens, training=True)
    routed = route(router, tokens, training=False)
    torch.testing.assert_close(weights_of(routed), torch.ones(IMAGES * TOKENS, 1))
    assert routed.selected.all()


@both_modes
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_a_masked_expert_gets_no_token_and_others_take_over(
    gate_name: str, expert: int, training: bool
) -> None:
    router = build_router(gate_name)
    router.masked[expert] = True
    routed = route(router, make_tokens(), training=training)
    assert not routed.selected[..., expert].any() and not weights_of(routed)[:, expert].any()
    assert routed.selected.any(-1).all(), "a token is sent to no expert although not all are masked"
    if not training:
        torch.testing.assert_close(weights_of(routed).sum(1), torch.ones(IMAGES * TOKENS))


@both_modes
def test_nothing_is_routed_and_all_is_finite_if_every_expert_is_masked(
    gate_name: str, training: bool
) -> None:
    router, tokens = build_router(gate_name), make_tokens().requires_grad_()
    router.masked.fill_(True)
    routed = route(router, tokens, training=training)
    assert not routed.selected.any() and not weights_of(routed).any() and routed.gates.isfinite().all()
    assert routed.aux_loss is None or routed.aux_loss.isfinite()
    layer = build_layer(router, copies=False).train(training)
    outputs = layer(tokens)
    assert not outputs.any()
    outputs.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), (
            f"the gradient of {name} is not finite"
        )


@both_modes
def test_routing_is_computed_in_full_precision(gate_name: str, training: bool) -> None:
    """Under autocast to bfloat16, the same tokens are routed in the same way."""
    tokens = make_tokens()
    want = route(build_router(gate_name), tokens, training=training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = route(build_router(gate_name), tokens.bfloat16(), training=training)
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(weights_of(got), weights_of(want), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.gates, want.gates, atol=1e-6, rtol=1e-5)


def test_tokens_do_not_mix_in_evaluation(gate_name: str) -> None:
    router, tokens = build_router(gate_name), make_tokens()
    together = route(router, tokens, training=False)
    if not same_routing(together, route(router, tokens, training=False, seed=1)):
        pytest.skip("draws at random in evaluation")
    alone = [route(router, image[None], training=False) for image in tokens]
    assert torch.equal(together.selected, torch.cat([routed.selected for routed in alone]))
    torch.testing.assert_close(weights_of(together), torch.cat([weights_of(routed) for routed in alone]))


def test_training_mode_changes_no_parameters_and_evaluation_nothing(gate_name: str) -> None:
    router, tokens = build_router(gate_name), make_tokens()
    before = copies(router)
    route(router, tokens, training=False)
    assert not changed(before, copies(router))
    route(router, tokens, training=True)
    assert not changed(before, copies(router)) & {name for name, _ in router.named_parameters()}


@both_modes
def test_routers_with_the_same_state_are_the_same(gate_name: str, training: bool) -> None:
    """Training state of a router, such as a schedule, is part of its state dict."""
    router, other, tokens = build_router(gate_name), build_router(gate_name, seed=1), make_tokens()
    for _ in range(5):
        route(router, tokens, training=True)
    other.load_state_dict(copies(router), strict=True)
    want = route(router, tokens, training=training)
    assert same_routing(route(other, tokens, training=training), want)


@both_modes
def test_nothing_is_read_back_from_the_device(gate_name: str, training: bool) -> None:
    """Otherwise a training step could not be captured as a CUDA graph. The device "meta" has no values to read."""
    router = build_router(gate_name).to("meta").train(training)
    for _ in range(2):
        routed = router(torch.empty(IMAGES, TOKENS, FEATURES, device="meta"))
    on_cpu = route(build_router(gate_name), make_tokens(), training=training)
    assert routed.selected.device.type == "meta" and routed.gates.shape == on_cpu.gates.shape
    assert routed.assignment.tokens.shape == on_cpu.assignment.tokens.shape


def test_a_gradient_reaches_every_parameter_of_a_trained_gate(gate_name: str) -> None:
    if not build_gate(gate_name).trained:
        pytest.skip("is not trained")
    router = build_router(gate_name)
    outputs, routing = build_layer(router, copies=False).train().route(make_tokens())
    (outputs.square().sum() + (0 if routing.aux_loss is None else routing.aux_loss)).backward()
    assert list(router.parameters()), "there is nothing to train"
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), f"{name}: its gradient is zero"


def test_a_trained_gate_starts_nearly_even(gate_name: str) -> None:
    if not build_gate(gate_name).trained:
        pytest.skip("is not trained")
    gates = route(build_router(gate_name), make_tokens(), training=False).gates
    assert (EXPERTS * gates - 1).abs().max() < 0.1, "a gate is not within 10% of 1 / E"


def test_each_expert_is_chosen_at_the_start(gate_name: str) -> None:
    """Ties do not decide: over several initialisations, every expert gets at least a third of an even share."""
    if not build_gate(gate_name).trained:
        pytest.skip("is not trained")
    routers = [build_router(gate_name, seed=seed) for seed in range(12)]
    used = torch.stack([route(router, make_tokens(), training=False).selected.float() for router in routers])
    shares = used.mean((0, 1, 2))
    assert shares.min() >= shares.mean() / 3, f"the experts' shares are {shares.tolist()}"


def test_hidden_states_set_a_gate_that_is_not_trained(gate_name: str) -> None:
    """Setting the weights twice has no further effect, and the mean state of a task is routed to its expert."""
    gate, states = build_gate(gate_name), orthogonal_states()
    router = gate(FEATURES, EXPERTS)
    if gate.trained:
        with pytest.raises(ConfigError, match="trained"):
            gate.set_from_states(router, states)
        return
    gate.set_from_states(router, states)
    first = copies(router)
    gate.set_from_states(router, states)
    assert not changed(first, copies(router)) and torch.equal(states, orthogonal_states())
    assert all(tensor.isfinite().all() for tensor in first.values())
    routed = route(router, states.unsqueeze(0), training=False)
    assert routed.selected[0].diagonal().all(), "a task's own mean state is not sent to its expert"
    gate.set_from_states(router, states.flip(0))
    assert changed(first, copies(router)), "the states have no effect"


def test_a_top_k_out_of_range_is_refused(gate_name: str) -> None:
    if "top_k" not in REGISTRIES["gate"].options(gate_name):
        pytest.skip("has no option top_k")
    for top_k in (-1, 0, EXPERTS + 1):
        with pytest.raises(ConfigError, match="top_k: expected"):
            make("gate", gate_name, top_k=top_k)(FEATURES, EXPERTS)


def test_unknown_options_are_refused_by_name(gate_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        make("gate", gate_name, no_such_option=1)
