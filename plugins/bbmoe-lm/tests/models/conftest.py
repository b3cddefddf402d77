"""Small models and texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from bbmoe_lm.models.llama import Llama
from bbmoe_lm.models.mixture import LlamaMixture
from torch import Tensor

from backdoorbench_moe.gates import create_gate

VOCABULARY, CONTEXT = 40, 24
SHAPE = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48}
GATES = {
    "top-k": {"init_std": 1.0},
    "soft": {"init_std": 1.0},
    "sample-top1": {"init_std": 1.0},
    "hidden": {},
}


def make_llama(seed: int = 0, **options: object) -> Llama:
    """Return a small Llama with weights large enough to have an effect."""
    torch.manual_seed(seed)
    model = Llama(**{"vocabulary": VOCABULARY, "context": CONTEXT, **SHAPE, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def tuned(base: Llama, seed: int) -> Llama:
    """Return a copy of a Llama with other weights in its MLPs."""
    expert = copy.deepcopy(base)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mlp in expert.mlps().values():
            for weight in mlp.parameters():
                weight.add_(torch.randn(weight.shape, generator=draws), alpha=0.3)
    return expert


def make_mixture(gate: str = "top-k", experts: int = 3, **options: object) -> LlamaMixture:
    """Return a mixture of Llamas with different MLPs."""
    base = make_llama(**options)
    built = create_gate(gate, **GATES[gate])
    torch.manual_seed(5)
    mixture = base.merge(experts, built)
    if gate == "hidden":
        for router in mixture.routers():
            built.set_from_states(router, torch.randn(experts, 32))
    states = [tuned(base, seed).state_dict() for seed in range(experts)]
    mixture.load_experts(base.state_dict(), states)
    return mixture


def make_texts() -> tuple[Tensor, Tensor]:
    """Return tokens (5, 10), padded on the right with 0, and their lengths."""
    lengths = torch.tensor([10, 4, 7, 1, 10])
    tokens = torch.randint(1, VOCABULARY, (5, 10), generator=torch.Generator().manual_seed(3))
    return tokens.masked_fill(torch.arange(10) >= lengths.unsqueeze(1), 0), lengths


@pytest.fixture
def lm() -> SimpleNamespace:
    """The functions of this file, since test files cannot import it."""
    functions: dict[str, Callable] = {
        "llama": make_llama,
        "tuned": tuned,
        "mixture": make_mixture,
        "texts": make_texts,
    }
    return SimpleNamespace(**functions, shape=SHAPE, vocabulary=VOCABULARY, gates=GATES)
