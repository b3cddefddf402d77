"""Layers against the dense MLP, a plain loop over tokens, and each other."""

from __future__ import annotations

import copy

import bbmoe_vmoe.dispatch as dispatching
import pytest
import torch
from bbmoe_vmoe.dispatch import by_buffers, by_expert, by_groups, combine, spread
from bbmoe_vmoe.experts import Experts
from bbmoe_vmoe.layers import SoftLayer, SoftRouter, SparseLayer, collecting
from bbmoe_vmoe.routers import ExpertChoiceRouter, TopKRouter
from timm.layers import Mlp
from torch import nn

IMAGES, TOKENS, FEATURES, EXPERTS = 3, 5, 8, 4
WAYS = {"expert": by_expert, "groups": by_groups, "buffers": by_buffers}


def mlp() -> Mlp:
    torch.manual_seed(1)
    return Mlp(FEATURES, 16)


def make_experts(count: int = EXPERTS, *, copies: bool = False) -> Experts:
    experts = Experts(mlp(), count, copies=copies)
    with torch.no_grad():
        for parameter in experts.parameters() if not copies else ():
            parameter.normal_(std=0.5)
    return experts


def images(count: int = IMAGES) -> torch.Tensor:
    return torch.randn(count, TOKENS, FEATURES, generator=torch.Generator().manual_seed(2))


def sparse(kind=TopKRouter, top_k=2, count=EXPERTS, **options) -> SparseLayer:
    router = kind(FEATURES, count, top_k=top_k, gate_std=1.0, **options)
    return SparseLayer(make_experts(count), router, name="here", prefix=1)


ROUTERS = {
    "top-k": lambda: TopKRouter(FEATURES, EXPERTS, top_k=2, gate_std=1.0).eval(),
    "top-k with little room": lambda: TopKRouter(
        FEATURES, EXPERTS, top_k=2, gate_std=1.0, eval_capacity=0.4
    ).eval(),
    "all": lambda: TopKRouter(FEATURES, EXPERTS, top_k=EXPERTS, gate_std=1.0).eval(),
    "expert choice": lambda: ExpertChoiceRouter(FEATURES, EXPERTS, top_k=2, gate_std=1.0),
}


def oracle(experts: Experts, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, weighted: einsums over all of (S, D) and (S, E)."""
    hidden = torch.einsum("sd,ehd->esh", tokens, experts.fc1.weights)
    hidden = hidden + experts.fc1.biases[:, None]
    outputs = torch.einsum("esh,edh->esd", nn.functional.gelu(hidden), experts.fc2.weights)
    outputs = outputs + experts.fc2.biases[:, None]
    return torch.einsum("se,esd->sd", weights, outputs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_way_to_dispatch_is_the_sum_over_all_experts_gradients_included(way, router):
    torch.manual_seed(0)
    experts, choose = make_experts(), ROUTERS[router]()
    parameters = [*experts.parameters(), choose.weight]
    tokens = images().requires_grad_()
    choice = choose(tokens)
    flat = tokens.flatten(0, 1)
    outputs = WAYS[way](flat, choice.assignment, experts)
    got = combine(outputs, choice.assignment, experts.heard, len(flat))
    want = oracle(experts, flat, (choice.gates * choice.selected).flatten(0, 1))
    torch.testing.assert_close(got, want)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((got * probe).sum(), [tokens, *parameters], retain_graph=True)
    expected = torch.autograd.grad((want * probe).sum(), [tokens, *parameters])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    table = spread(outputs, choice.assignment, len(flat), EXPERTS)
    torch.testing.assert_close(table.sum(0), want)


def test_the_room_is_what_a_test_above_says():
    torch.manual_seed(0)
    choice = ROUTERS["top-k with little room"]()(images())
    assert choice.assignment.capacity == 3 and 0 < choice.selected.sum() < 2 * IMAGES * TOKENS


@pytest.mark.parametrize("way", WAYS)
def test_experts_without_tokens_are_no_trouble(way):
    experts, router = make_experts(), TopKRouter(FEATURES, EXPERTS, top_k=1, gate_std=1.0).eval()
    router.masked[[0, 2, 3]] = True
    choice, flat = router(images()), images().flatten(0, 1)
    got = combine(WAYS[way](flat, choice.assignment, experts), choice.assignment, experts.heard, len(flat))
    only = torch.zeros(len(flat), EXPERTS)
    only[:, 1] = 1
    torch.testing.assert_close(got, oracle(experts, flat, only))


@pytest.mark.parametrize("kind", [TopKRouter, ExpertChoiceRouter])
@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_the_dense_mlp_gradients_included(kind, training):
    dense = mlp()
    router = kind(FEATURES, 1, top_k=1, gate_std=1.0)
    layer = SparseLayer(Experts(copy.deepcopy(dense), 1, copies=True), router, name="here", prefix=1)
    tokens, other = images().requires_grad_(), images().requires_grad_()
    got, want = layer.train(training)(tokens), dense(other)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(tokens.grad, other.grad)
    for stacked, own in zip(layer.experts.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(stacked.grad, own.grad)


def test_drawn_experts_differ_and_copies_do_not():
    drawn, copied = Experts(mlp(), 3, copies=False), Experts(mlp(), 3, copies=True)
    assert not torch.equal(drawn.fc1.weights[0], drawn.fc1.weights[1])
    assert all(torch.equal(weight, mlp().fc2.weight) for weight in copied.fc2.weights)
    assert drawn.fc2.weight.std().item() == pytest.approx(0.02, rel=0.15) and not drawn.fc1.bias.any()


@pytest.mark.parametrize("router", ["top-k", "all", "expert choice"])
@torch.no_grad()
def test_watched_hidden_units_are_those_of_the_tokens_an_expert_gets_and_change_no_bit(router):
    """Sums over the rows against a loop over tokens; padding adds nothing. With a ReLU, and without."""
    torch.manual_seed(0)
    layer = SparseLayer(make_experts(), ROUTERS[router](), name="here", prefix=1).eval()
    tokens, seen = images(), []
    plain = dispatching.by_expert(tokens.flatten(0, 1), layer.router(tokens).assignment, layer.experts)
    hook = layer.experts.hidden.register_forward_hook(lambda m, _, output: seen.append(output))
    watched = dispatching.dispatch(tokens.flatten(0, 1), layer.router(tokens).assignment, layer.experts)
    hook.remove()
    assert torch.equal(watched, plain)
    [rows], chosen = seen, layer.router(tokens).selected
    for change in (torch.relu, torch.nn.Identity()):
        want = torch.zeros(EXPERTS, 16)
        for image, token, expert in chosen.nonzero().tolist():
            own = layer.experts.fc1
            want[expert] += change(own.weights[expert] @ tokens[image, token] + own.biases[expert])
        torch.testing.assert_close(change(rows).sum(0), want.flatten())


@torch.no_grad()
def test_watched_hidden_units_of_a_soft_layer_are_those_of_its_slots():
    layer, tokens, seen = soft(), images(), []
    hook = layer.experts.hidden.register_forward_hook(lambda m, _, output: seen.append(output))
    layer(tokens)
    hook.remove()
    mixtures = torch.einsum("bnes,bnd->ebsd", layer.router(tokens)[0], tokens)
    own = layer.experts.fc1
    want = torch.einsum("ebsd,ehd->bseh", mixtures, own.weights) + own.biases
    torch.testing.assert_close(seen[0], want.flatten(0, 1).flatten(1))


@pytest.mark.parametrize("kind", [TopKRouter, ExpertChoiceRouter])
def test_watching_changes_no_bit_and_the_tap_gives_what_adds_up(kind):
    torch.manual_seed(0)
    layer, seen = sparse(kind, top_k=3).eval(), []
    plain = layer(images())
    layer.experts.heard[1] = 0
    muted = layer(images())
    hook = layer.tap.register_forward_hook(lambda m, _, output: seen.append(output))
    assert torch.equal(layer(images()), muted)
    hook.remove()
    assert seen[0].shape == (IMAGES, EXPERTS, TOKENS, FEATURES)
    torch.testing.assert_close(seen[0].sum(1), plain)
    torch.testing.assert_close(plain - muted, seen[0][:, 1])


def test_soft_weights_by_hand():
    """Directions at right angles, so the logits of a token are its cosines with them times the scale."""
    router = SoftRouter(2, 2, 1)
    with torch.no_grad():
        router.slots.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        router.scale.fill_(2.0)
    given, taken = router(torch.tensor([[[5.0, 0.0], [0.3, 0.4]]]))
    logits = 2 * torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(given[0, :, :, 0], logits.softmax(0))
    torch.testing.assert_close(taken[0, :, :, 0], logits.softmax(1))


def soft(slots: int = 2, prefix: int = 1) -> SoftLayer:
    torch.manual_seed(0)
    return SoftLayer(make_experts(), SoftRouter(FEATURES, EXPERTS, slots), name="here", prefix=prefix).eval()


def test_a_soft_layer_is_a_plain_loop_over_experts_and_slots():
    layer, tokens = soft(), images()
    given, taken = layer.router(tokens)
    want = torch.zeros_like(tokens)
    for image in range(IMAGES):
        for expert in range(EXPERTS):
            for slot in range(2):
                mixture = sum(given[image, n, expert, slot] * tokens[image, n] for n in range(TOKENS))
                only = torch.nn.functional.one_hot(torch.tensor([expert]), EXPERTS).float()
                answer = oracle(layer.experts, mixture[None], only)[0]
                want[image] += taken[image, :, expert, slot, None] * answer
    torch.testing.assert_close(layer(tokens), want)


def test_soft_routing_is_a_distribution_over_the_patches_and_selects_more_than_an_even_share():
    layer, tokens = soft(slots=3), images()
    with collecting() as [*none]:
        assert none == []
    with collecting() as found:
        layer(tokens)
    [routing] = found
    given = layer.router(tokens)[0][:, 1:].sum(-1).transpose(1, 2)
    torch.testing.assert_close(routing.gates, given / given.sum(-1, keepdim=True))
    assert routing.gates.shape == (IMAGES, EXPERTS, TOKENS - 1) and routing.layer == "here"
    assert torch.equal(routing.selected, routing.gates > 0.25) and routing.selected.any()


def test_no_token_listens_to_a_masked_soft_expert():
    layer = soft()
    layer.router.masked[2] = True
    before = layer(images())
    with torch.no_grad():
        layer.experts.fc2.weights[2] += 1
    assert torch.equal(layer(images()), before)
    assert layer.router(images())[1].sum((2, 3)).allclose(torch.ones(()))


def test_routing_goes_to_who_collects_and_to_nobody_else():
    layer = sparse().eval()
    layer(images())
    with collecting() as outer:
        layer(images())
        with collecting() as inner:
            layer(images(2))
    assert [len(found[0].gates) for found in (outer, inner)] == [IMAGES, 2] and len(outer) == len(inner) == 1
    assert outer[0].gates.shape == (IMAGES, EXPERTS, TOKENS - 1), "the first token is no patch"


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_the_experts_are_in_bf16_and_the_ways_agree(way):
    torch.manual_seed(0)
    experts, choose = make_experts(), ROUTERS["top-k"]()
    flat = images().flatten(0, 1)
    want = oracle(
        experts, flat, (lambda choice: (choice.gates * choice.selected).flatten(0, 1))(choose(images()))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assignment = choose(images()).assignment
        outputs = WAYS[way](flat, assignment, experts)
        got = combine(outputs, assignment, experts.heard, len(flat))
    assert outputs.dtype == got.dtype == torch.bfloat16 and assignment.weights.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05 * want.abs().max().item())


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_the_gradients_are_those_of_fp32_also_of_biases_that_many_tokens_share(way):
    """A sum of 1000 equal gradients of 1 in bf16 itself would end at 256."""
    torch.manual_seed(0)
    router = TopKRouter(FEATURES, EXPERTS, top_k=2, gate_std=1.0).eval()
    flat = torch.randn(4000, FEATURES, generator=torch.Generator().manual_seed(2))
    assignment = router(flat.unsqueeze(0)).assignment
    found = {}
    for kind, chosen in (("want", by_expert), ("got", WAYS[way])):
        experts = make_experts()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "got"):
            outputs = chosen(flat, assignment, experts)
        outputs.float().sum().backward()
        found[kind] = [p.grad for p in experts.parameters()]
    for got, want in zip(found["got"], found["want"], strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("router", "way"), [("top-k", "by_expert"), ("expert choice", "by_buffers"), ("all", "by_buffers")]
)
def test_on_a_cpu_batched_where_the_room_is_what_the_tokens_need_and_otherwise_expert_by_expert(
    router, way, monkeypatch
):
    seen = []
    for name in ("by_expert", "by_groups", "by_buffers"):
        original = getattr(dispatching, name)
        monkeypatch.setattr(
            dispatching, name, lambda *given, n=name, f=original: (seen.append(n), f(*given))[1]
        )
    dispatching.dispatch(images().flatten(0, 1), ROUTERS[router]()(images()).assignment, make_experts())
    assert seen == [way]
