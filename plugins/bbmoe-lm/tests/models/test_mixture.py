"""Mixtures of Llamas: their outputs, and equality with transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from bbmoe_lm.models.mixture import save_checkpoint, to_mixtral
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.gates import create_gate
from backdoorbench_moe.moe.layers import TopKRouter
from backdoorbench_moe.moe.merging import expert_of, mlp_inputs, only_expert
from backdoorbench_moe.moe.routed import auxiliary_loss
from backdoorbench_moe.moe.structure import Merged, MergesItself, WithMLPs

GATES = ["top-k", "soft", "sample-top1", "hidden"]


def test_protocols(lm):
    base, mixture = lm.llama(), lm.mixture()
    assert isinstance(base, WithMLPs) and isinstance(base, MergesItself) and isinstance(mixture, Merged)
    assert isinstance(mixture.network.network, MixtralForCausalLM)
    assert [layer.name for layer in mixture.layers()] == [f"network.{name}" for name in base.mlps()]
    assert mixture.components().keys() == {"experts", "router", "head"}


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_equal_experts_are_the_dense_model(lm, gate):
    base, (tokens, _) = lm.llama(), lm.texts()
    mixture = base.merge(4, create_gate(gate, **lm.gates[gate]))
    assert not mixture.training
    torch.testing.assert_close(mixture(tokens), base(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_an_expert_alone_is_itself(lm, gate):
    base, mixture, (tokens, _) = lm.llama(), lm.mixture(gate), lm.texts()
    for number in range(3):
        expert = lm.tuned(base, number)
        with only_expert(mixture, number):
            torch.testing.assert_close(mixture(tokens), expert(tokens), rtol=1e-4, atol=1e-4)
        taken = expert_of(mixture, number)
        assert all(torch.equal(taken[name], tensor) for name, tensor in expert.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_merging_shares_no_memory_with_the_base(lm, tied):
    base = lm.llama()
    base.network.config.tie_word_embeddings = tied
    base.network.tie_weights()
    mixture = base.merge(2, create_gate("top-k"))
    network = mixture.network.network
    assert (network.lm_head.weight is network.model.embed_tokens.weight) is tied
    owned = {tensor.data_ptr() for tensor in base.state_dict().values()}
    assert not owned & {tensor.data_ptr() for tensor in mixture.state_dict().values()}


def test_another_base_is_refused(lm):
    base, mixture = lm.llama(), lm.mixture()
    other = lm.llama(seed=1).state_dict()
    with pytest.raises(
        ConfigError, match=r"^expert 1: is not tuned from this base: network.model.embed_tokens"
    ):
        mixture.load_experts(base.state_dict(), [base.state_dict(), other, base.state_dict()])


def softmax_over_the_chosen(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """MoEvil's gate, equation 1: all but the largest logits are minus infinity."""
    smallest = logits.topk(top_k, -1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf).softmax(-1)


@pytest.mark.parametrize(("gate", "top_k"), [("top-k", 2), ("soft", 3), ("hidden", 2)])
@torch.no_grad()
def test_a_layer_is_moevils_equation(lm, gate, top_k):
    mixture, base, (tokens, lengths) = lm.mixture(gate), lm.llama(), lm.texts()
    first, seen = mixture.layers()[0], {}
    hook = first.register_forward_hook(lambda _, given, output: seen.update(given=given[0], output=output))
    routing = mixture.forward_routed(tokens).routing[0]
    hook.remove()
    logits = seen["given"] @ first.router.weight.T
    weights = softmax_over_the_chosen(logits, top_k)
    name = next(iter(base.mlps()))
    outputs = [lm.tuned(base, number).get_submodule(name)(seen["given"]) for number in range(3)]
    want = sum(weights[..., e, None] * outputs[e] for e in range(3))
    torch.testing.assert_close(seen["output"], want, rtol=1e-3, atol=1e-4)
    real = torch.arange(10) < lengths.unsqueeze(1)
    torch.testing.assert_close(routing.gates, (logits.softmax(-1) * real.unsqueeze(-1)).transpose(1, 2))
    assert torch.equal(routing.selected, ((weights > 0) & real.unsqueeze(-1)).transpose(1, 2))


@pytest.mark.parametrize("gate", ["top-k", "soft"])
def test_padding_does_not_count_in_training(lm, gate):
    """More padding, or texts of padding only, do not change the balance loss and its gradient."""
    mixture, (tokens, _) = lm.mixture(gate).train(), lm.texts()
    for router in mixture.routers():
        router.noise = 0.0
    found = []
    for padded in (tokens, F.pad(tokens, (0, 3)), torch.cat([tokens, torch.zeros_like(tokens[:2])])):
        loss = auxiliary_loss(mixture.forward_routed(padded).routing)
        found.append((loss.detach(), *torch.autograd.grad(loss, [mixture.routers()[0].weight])))
    assert found[0][1].any()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_inputs_of_the_layers_are_those_of_the_dense_model(lm):
    base, (tokens, _) = lm.llama(), lm.texts()
    mixture = base.merge(2, create_gate("soft"))
    with mlp_inputs(base) as dense:
        base(tokens)
    with mlp_inputs(mixture) as merged:
        mixture(tokens)
    assert [f"network.{name}" for name in dense] == list(merged)
    torch.testing.assert_close(list(dense.values()), list(merged.values()), rtol=1e-4, atol=1e-4)


OUTSIDE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM
assert not any(name.startswith(("bbmoe", "backdoorbench")) for name in sys.modules)
model, info = MixtralForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    save_file({"logits": model.eval()(load_file(sys.argv[2])["tokens"]).logits.contiguous()}, sys.argv[3])
"""


@pytest.mark.slow
@torch.no_grad()
def test_transformers_alone_loads_the_checkpoint_and_gives_the_same_logits(lm, tmp_path):
    mixture, (tokens, _) = lm.mixture(), lm.texts()
    save_checkpoint(mixture, tmp_path / "merged", end=1)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    names = [str(tmp_path / name) for name in ("merged", "tokens.safetensors", "logits.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *names], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, mixture(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["top-k", "soft", "hidden"])
@torch.no_grad()
def test_mixtral_computes_the_same(lm, gate):
    mixture, (tokens, _) = lm.mixture(gate), lm.texts()
    mixture.layers()[1].experts.heard[2] = 0
    mixtral = to_mixtral(mixture)
    assert mixtral.config.num_experts_per_tok == (3 if gate == "soft" else 2)
    torch.testing.assert_close(mixtral(tokens).logits, mixture(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_drawn_expert_becomes_the_most_probable_one(lm):
    mixture, (tokens, _) = lm.mixture("sample-top1"), lm.texts()
    mixtral = to_mixtral(mixture)
    for router in mixture.routers():
        router.weight *= 1e6
    torch.testing.assert_close(mixtral(tokens).logits, mixture(tokens), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_a_mixtral_is_one_clear_line(lm, tmp_path):
    mixture = lm.mixture()
    mixture.mask_expert(mixture.experts()[1])
    with pytest.raises(
        ConfigError, match=r"layers.0.mlp: expected no masked expert, as Mixtral's router cannot"
    ):
        save_checkpoint(mixture, tmp_path / "masked")
    other = lm.llama().merge(
        2, lambda features, experts: TopKRouter(features, experts, top_k=1, gate_std=1.0)
    )
    with pytest.raises(ConfigError, match=r"^gate: TopKRouter cannot be written as a Mixtral"):
        save_checkpoint(other, tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match=r"^folder: expected a new or empty folder, got "):
        save_checkpoint(lm.llama(), tmp_path / "full")
    with pytest.raises(ConfigError, match=r"^num_experts: expected an integer of at least 1, got 0"):
        lm.llama().merge(0, create_gate("top-k"))
