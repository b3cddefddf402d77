"""The sparse layer against the dense MLP, what its tap passes, and who receives its routing."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_parts import (
    EXPERTS,
    FEATURES,
    IMAGES,
    TOKENS,
    make_experts,
    make_mlp,
    make_sparse,
    make_tokens,
    plain_moe,
    stack,
)
from torch import Tensor

from backdoorbench_moe.moe.layers import (
    ExpertChoiceRouter,
    LinearRouter,
    RouterOutput,
    SparseMoELayer,
    TopKRouter,
    assign_chosen,
    collect_routing,
    top_experts,
)


@pytest.mark.parametrize("kind", [TopKRouter, ExpertChoiceRouter])
@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_the_dense_mlp_gradients_included(kind, training):
    dense = make_mlp()
    router = kind(FEATURES, 1, top_k=1, gate_std=1.0)
    layer = SparseMoELayer(stack(copy.deepcopy(dense), 1, copies=True), router, name="here")
    tokens, other = make_tokens().requires_grad_(), make_tokens().requires_grad_()
    got, want = layer.train(training)(tokens), dense(other)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(tokens.grad, other.grad)
    for stacked, own in zip(layer.experts.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(stacked.grad, own.grad)


@pytest.mark.parametrize("kind", [TopKRouter, ExpertChoiceRouter])
def test_watching_changes_no_bit_and_the_tap_passes_what_adds_up(kind):
    torch.manual_seed(0)
    layer, seen = make_sparse(kind, top_k=3).eval(), []
    plain = layer(make_tokens())
    layer.experts.heard[1] = 0
    muted = layer(make_tokens())
    hook = layer.tap.register_forward_hook(lambda m, _, output: seen.append(output))
    assert torch.equal(layer(make_tokens()), muted)
    hook.remove()
    assert seen[0].shape == (IMAGES, EXPERTS, TOKENS, FEATURES)
    torch.testing.assert_close(seen[0].sum(1), plain)
    torch.testing.assert_close(plain - muted, seen[0][:, 1])


def test_routing_goes_to_the_innermost_collector_and_to_no_other():
    layer = make_sparse().eval()
    layer(make_tokens())
    with collect_routing() as outer:
        layer(make_tokens())
        with collect_routing() as inner:
            layer(make_tokens(2))
    assert [len(found[0].gates) for found in (outer, inner)] == [IMAGES, 2] and len(outer) == len(inner) == 1
    routed = layer.router(make_tokens())
    assert outer[0].gates.shape == (IMAGES, EXPERTS, TOKENS - 1), "the first token is no patch"
    assert torch.equal(outer[0].gates, routed.gates[:, 1:].mT)
    assert torch.equal(outer[0].selected, routed.selected[:, 1:].mT)


def test_a_map_is_routed_as_its_cells_row_by_row():
    layer = SparseMoELayer(make_experts(), TopKRouter(FEATURES, EXPERTS, top_k=2, gate_std=1.0), name="here")
    cells = torch.randn(2, 3, 4, FEATURES, generator=torch.Generator().manual_seed(5))
    with collect_routing() as found:
        outputs = layer.eval()(cells)
        flat = layer(cells.reshape(2, 12, FEATURES))
    assert outputs.shape == cells.shape and torch.equal(outputs.reshape(flat.shape), flat)
    assert torch.equal(found[0].gates, found[1].gates) and found[0].gates.shape == (2, EXPERTS, 12)


def test_the_smallest_capacity_is_one_token():
    layer = make_sparse(eval_capacity=1e-9).eval()
    with collect_routing() as found:
        layer(make_tokens())
    assert layer.router(make_tokens()).selected.sum((0, 1)).tolist() == [1] * EXPERTS
    assert found[0].selected.sum() <= EXPERTS


@pytest.mark.parametrize("kind", [TopKRouter, ExpertChoiceRouter])
@pytest.mark.parametrize("watched", [False, True])
def test_no_images(kind, watched):
    layer = make_sparse(kind).eval()
    if watched:
        layer.tap.register_forward_hook(lambda *_: None)
    with collect_routing() as found:
        assert layer(make_tokens(0)).shape == (0, TOKENS, FEATURES)
    assert found[0].gates.shape == found[0].selected.shape == (0, EXPERTS, TOKENS - 1)


class OverTheChosen(LinearRouter):
    """Another gate, as another package would add it: a softmax over the logits of the two best experts only."""

    def choose(self, logits: Tensor) -> RouterOutput:
        flat = logits.flatten(0, 1)
        chosen = top_experts(flat, 2)
        weights = torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen).softmax(-1))
        kept = torch.ones_like(chosen, dtype=torch.bool)
        selected = torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, kept)
        shape = logits.shape[:2]
        assignment = assign_chosen(weights, chosen, kept, len(flat))
        return RouterOutput(flat.softmax(-1).unflatten(0, shape), selected.unflatten(0, shape), assignment)


def test_another_gate_works_with_the_same_dispatch_and_experts():
    """Its weights sum to 1, so that copies of one MLP are that MLP, whatever it chooses."""
    tokens, dense = make_tokens(), make_mlp()
    router = OverTheChosen(FEATURES, EXPERTS, gate_std=1.0)
    copies = SparseMoELayer(stack(dense, EXPERTS, copies=True), router, name="here")
    torch.testing.assert_close(copies(tokens), dense(tokens))
    layer = SparseMoELayer(make_experts(), router, name="here")
    logits = torch.einsum("bnd,ed->bne", tokens, router.weight).flatten(0, 1)
    best = logits.topk(2)
    weights = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(1))
    torch.testing.assert_close(
        layer(tokens).flatten(0, 1), plain_moe(layer.experts, tokens.flatten(0, 1), weights)
    )
