"""The losses that keep experts evenly loaded."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.moe.layers import TopKRouter, importance_loss, load_loss

# Four tokens, three experts; the first choices are 0, 0, 1, 0, the second ones 1, 2, 0, 2.
GATES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.2, 0.7, 0.1], [0.9, 0.04, 0.06]])


def test_importance_by_hand():
    """Sums are 2.2, 1.24 and 0.56: mean 4 / 3."""
    sums = [2.2, 1.24, 0.56]
    want = sum((s - 4 / 3) ** 2 for s in sums) / 3 / (4 / 3) ** 2
    assert importance_loss(GATES).item() == pytest.approx(want, rel=1e-5)
    assert importance_loss(torch.full((5, 4), 0.25)).item() == pytest.approx(0, abs=1e-12)


def test_load_is_the_chance_to_be_chosen_once_more():
    """Against drawing the noise of one expert again, many times over, with the others' left as it was."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.2, 0.0, -0.1], [0.1, 0.3, 0.0]])
    noisy = logits + 0.3 * torch.randn(2, 3, generator=generator)
    threshold = noisy.sort(-1, descending=True).values[:, 1]
    draws = logits + 0.3 * torch.randn(200_000, 2, 3, generator=generator)
    load = (draws >= threshold[:, None]).double().mean(0).sum(0)
    want = (load.var(correction=0) / load.mean() ** 2).item()
    assert load_loss(logits, noisy, 0.3, 2).item() == pytest.approx(want, abs=2e-3)


def test_the_losses_pull_an_uneven_router_even():
    torch.manual_seed(0)
    router = TopKRouter(4, 4, top_k=1, gate_std=0.0, importance=1.0, load=1.0).train()
    with torch.no_grad():
        router.weight[0] += 0.2
    tokens = torch.rand(1, 200, 4)
    router(tokens).aux_loss.backward()
    pull = router.weight.grad.sum(1)
    assert pull[0] > 0 and (pull[1:] < 0).all()
