"""The ways to dispatch tokens, against a plain sum over all experts and against each other."""

from __future__ import annotations

import pytest
import torch
from moe_parts import (
    EXPERTS,
    FEATURES,
    HIDDEN,
    IMAGES,
    ROUTERS,
    TOKENS,
    WAYS,
    make_experts,
    make_tokens,
    plain_moe,
)

from backdoorbench_moe.moe.layers import TopKRouter, combine, dispatching, scatter_outputs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_way_is_the_sum_over_all_experts_gradients_included(way, router):
    torch.manual_seed(0)
    experts, choose = make_experts(), ROUTERS[router]()
    parameters = [*experts.parameters(), choose.weight]
    tokens = make_tokens().requires_grad_()
    routed = choose(tokens)
    flat = tokens.flatten(0, 1)
    outputs = WAYS[way](flat, routed.assignment, experts)
    got = combine(outputs, routed.assignment, experts.heard, len(flat))
    want = plain_moe(experts, flat, (routed.gates * routed.selected).flatten(0, 1))
    torch.testing.assert_close(got, want)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((got * probe).sum(), [tokens, *parameters], retain_graph=True)
    expected = torch.autograd.grad((want * probe).sum(), [tokens, *parameters])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    table = scatter_outputs(outputs, routed.assignment, len(flat), EXPERTS)
    torch.testing.assert_close(table.sum(0), want)


def test_little_room_drops_some_pairs_and_keeps_others():
    """The router "top-k with little room" of the test above has room for ceil(2 * 15 * 0.4 / 4) = 3."""
    torch.manual_seed(0)
    routed = ROUTERS["top-k with little room"]()(make_tokens())
    assert routed.assignment.capacity == 3 and 0 < routed.selected.sum() < 2 * IMAGES * TOKENS


@pytest.mark.parametrize("way", WAYS)
def test_experts_without_tokens_are_allowed(way):
    experts, router = make_experts(), TopKRouter(FEATURES, EXPERTS, top_k=1, gate_std=1.0).eval()
    router.masked[[0, 2, 3]] = True
    assignment, flat = router(make_tokens()).assignment, make_tokens().flatten(0, 1)
    got = combine(WAYS[way](flat, assignment, experts), assignment, experts.heard, len(flat))
    only = torch.zeros(len(flat), EXPERTS)
    only[:, 1] = 1
    torch.testing.assert_close(got, plain_moe(experts, flat, only))


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_the_experts_are_in_bf16_and_the_ways_agree(way):
    torch.manual_seed(0)
    experts, choose = make_experts(), ROUTERS["top-k"]()
    flat, routed = make_tokens().flatten(0, 1), choose(make_tokens())
    want = plain_moe(experts, flat, (routed.gates * routed.selected).flatten(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assignment = choose(make_tokens()).assignment
        outputs = WAYS[way](flat, assignment, experts)
        got = combine(outputs, assignment, experts.heard, len(flat))
    assert outputs.dtype == got.dtype == torch.bfloat16 and assignment.weights.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05 * want.abs().max().item())


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_gradients_are_close_to_those_in_fp32_also_of_biases_that_many_tokens_share(way):
    """A sum of 1000 equal gradients of 1 in bf16 itself would end at 256."""
    torch.manual_seed(0)
    router = TopKRouter(FEATURES, EXPERTS, top_k=2, gate_std=1.0).eval()
    flat = torch.randn(4000, FEATURES, generator=torch.Generator().manual_seed(2))
    assignment = router(flat.unsqueeze(0)).assignment
    found = {}
    for kind, chosen in (("want", WAYS["each"]), ("got", WAYS[way])):
        experts = make_experts()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "got"):
            outputs = chosen(flat, assignment, experts)
        outputs.float().sum().backward()
        found[kind] = [p.grad for p in experts.parameters()]
    for got, want in zip(found["got"], found["want"], strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("router", "way"),
    [("top-k", "dispatch_each"), ("expert choice", "dispatch_batched"), ("all", "dispatch_batched")],
)
def test_on_a_cpu_batched_if_the_capacity_is_what_the_tokens_need_and_otherwise_one_after_the_other(
    router, way, monkeypatch
):
    seen = []
    for name in ("dispatch_each", "dispatch_grouped", "dispatch_batched"):
        original = getattr(dispatching, name)
        monkeypatch.setattr(
            dispatching, name, lambda *given, n=name, f=original: (seen.append(n), f(*given))[1]
        )
    assignment = ROUTERS[router]()(make_tokens()).assignment
    dispatching.dispatch(make_tokens().flatten(0, 1), assignment, make_experts())
    assert seen == [way]


@pytest.mark.parametrize("router", ["top-k", "all", "expert choice"])
@torch.no_grad()
def test_watched_hidden_units_are_those_of_each_experts_tokens_and_watching_changes_no_bit(router):
    """Sums over the rows against a loop over tokens; padding adds nothing. With a ReLU, and without."""
    torch.manual_seed(0)
    experts, choose = make_experts(), ROUTERS[router]()
    tokens, seen = make_tokens(), []
    assignment = choose(tokens).assignment
    plain = dispatching.dispatch_each(tokens.flatten(0, 1), assignment, experts)
    hook = experts.hidden.register_forward_hook(lambda m, _, output: seen.append(output))
    watched = dispatching.dispatch(tokens.flatten(0, 1), assignment, experts)
    hook.remove()
    assert torch.equal(watched, plain)
    [rows], chosen = seen, choose(tokens).selected
    for change in (torch.relu, torch.nn.Identity()):
        want = torch.zeros(EXPERTS, HIDDEN)
        for image, token, expert in chosen.nonzero().tolist():
            own = experts.fc1
            want[expert] += change(own.weights[expert] @ tokens[image, token] + own.biases[expert])
        torch.testing.assert_close(change(rows).sum(0), want.flatten())
