"""The soft layer by hand and against plain loops."""

from __future__ import annotations

import torch
from moe_parts import EXPERTS, IMAGES, TOKENS, make_soft, make_tokens, plain_moe

from backdoorbench_moe.moe.layers import SoftRouter, collect_routing


def test_weights_by_hand():
    """Directions at right angles, so the logits of a token are its cosines with them times the scale."""
    router = SoftRouter(2, 2, 1)
    with torch.no_grad():
        router.slots.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        router.scale.fill_(2.0)
    given, taken = router(torch.tensor([[[5.0, 0.0], [0.3, 0.4]]]))
    logits = 2 * torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(given[0, :, :, 0], logits.softmax(0))
    torch.testing.assert_close(taken[0, :, :, 0], logits.softmax(1))


def test_a_soft_layer_is_a_plain_loop_over_experts_and_slots():
    layer, tokens = make_soft(), make_tokens()
    given, taken = layer.router(tokens)
    want = torch.zeros_like(tokens)
    for image in range(IMAGES):
        for expert in range(EXPERTS):
            for slot in range(2):
                mixture = sum(given[image, n, expert, slot] * tokens[image, n] for n in range(TOKENS))
                only = torch.nn.functional.one_hot(torch.tensor([expert]), EXPERTS).float()
                answer = plain_moe(layer.experts, mixture[None], only)[0]
                want[image] += taken[image, :, expert, slot, None] * answer
    torch.testing.assert_close(layer(tokens), want)


def test_routing_is_a_distribution_over_the_patches_and_selects_more_than_an_even_share():
    layer, tokens = make_soft(slots=3), make_tokens()
    with collect_routing() as [*none]:
        assert none == []
    with collect_routing() as found:
        layer(tokens)
    [routing] = found
    given = layer.router(tokens)[0][:, 1:].sum(-1).transpose(1, 2)
    torch.testing.assert_close(routing.gates, given / given.sum(-1, keepdim=True))
    assert routing.gates.shape == (IMAGES, EXPERTS, TOKENS - 1) and routing.layer == "here"
    assert torch.equal(routing.selected, routing.gates > 0.25) and routing.selected.any()


def test_no_images():
    with collect_routing() as found:
        assert make_soft()(make_tokens(0)).shape == (0, TOKENS, 8)
    assert found[0].gates.shape == (0, EXPERTS, TOKENS - 1)


def test_no_token_listens_to_a_masked_expert():
    layer = make_soft()
    plain = layer(make_tokens())
    layer.mask_expert(2)
    before = layer(make_tokens())
    assert not torch.allclose(before, plain)
    with torch.no_grad():
        layer.experts.fc2.weights[2] += 1
    assert torch.equal(layer(make_tokens()), before)
    assert layer.router(make_tokens())[1].sum((2, 3)).allclose(torch.ones(()))


@torch.no_grad()
def test_watched_hidden_units_are_those_of_the_slots():
    layer, tokens, seen = make_soft(), make_tokens(), []
    hook = layer.experts.hidden.register_forward_hook(lambda m, _, output: seen.append(output))
    layer(tokens)
    hook.remove()
    mixtures = torch.einsum("bnes,bnd->ebsd", layer.router(tokens)[0], tokens)
    own = layer.experts.fc1
    want = torch.einsum("ebsd,ehd->bseh", mixtures, own.weights) + own.biases
    torch.testing.assert_close(seen[0], want.flatten(0, 1).flatten(1))


@torch.no_grad()
def test_the_output_is_zero_if_all_experts_are_masked():
    layer = make_soft()
    for expert in range(EXPERTS):
        layer.mask_expert(expert)
    assert not layer(make_tokens()).any()


@torch.no_grad()
def test_gates_are_finite_if_a_class_token_takes_a_whole_slot():
    """Its cosine with the slot is 1; those of the patches are lower, and the scale makes their weights 0 in fp32."""
    layer, tokens = make_soft(slots=1), make_tokens()
    layer.router.scale.fill_(1000.0)
    tokens[:, 0] = layer.router.slots[0]
    with collect_routing() as found:
        layer(tokens)
    assert found[0].gates.isfinite().all()
    assert not found[0].gates[:, 0].any() and not found[0].selected[:, 0].any()
