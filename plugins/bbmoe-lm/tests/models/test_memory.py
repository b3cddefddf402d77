"""The memory estimate, compared with models that are built and run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bbmoe_lm.models.llama import Llama
from bbmoe_lm.models.memory import bytes_needed

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.gates import create_gate

SHAPES = [
    {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 96},
    {"hidden_size": 32, "layers": 5, "heads": 8, "kv_heads": 2, "intermediate_size": 128},
]


def build(shape, gate):
    """Return the dense model's configuration and the model, merged from four experts if a gate is given."""
    model = Llama(vocabulary=80, context=32, **shape)
    config = model.network.config
    return config, model if gate is None else model.merge(4, create_gate(gate))


def size(modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [None, "top-k"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_states_are_exact(shape, gate, tied):
    config, model = build(shape, gate)
    if tied:
        config.tie_word_embeddings = True
        network = model.network if gate is None else model.network.network
        network.config.tie_word_embeddings = True
        network.tie_weights()
    parts = {"all": [model], "nothing": []}
    parts["mlps"] = list(model.mlps().values()) if gate is None else model.components()["experts"]
    if gate is not None:
        parts["gates"] = model.routers()
    for trained, modules in parts.items():
        found = bytes_needed(config, 2, 16, trained, experts=0 if gate is None else 4)
        assert found.weights == size([model])
        assert (found.gradients, found.optimizer) == (size(modules), 2 * size(modules))
        assert found.total == found.weights + found.gradients + found.optimizer + found.activations


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gate", "top_k"), [(None, 1), ("top-k", 2), ("soft", 4)])
def test_activations_are_about_what_is_kept_for_the_backward_pass(shape, gate, top_k):
    config, model = build(shape, gate)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(1, 80, (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.train()(tokens)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    measured = sum(t.untyped_storage().nbytes() for t in kept.values()) + 2 * logits.numel() * 4
    said = bytes_needed(config, 4, 32, "all", experts=0 if gate is None else 4, top_k=top_k).activations
    assert 0.85 < said / measured < 1.25


def test_as_text_and_wrong_numbers():
    config, _ = build(SHAPES[0], None)
    assert str(bytes_needed(config, 1, 1, "nothing")).startswith("0.00 GiB (weights 0.00, gradients 0.00, ")
    for values in ({"batch": 0}, {"length": 0}, {"top_k": 0}):
        with pytest.raises(
            ConfigError, match=rf"^{next(iter(values))}: expected an integer of at least 1, got 0"
        ):
            bytes_needed(config, **{"batch": 1, "length": 1, "trained": "all", **values})
    with pytest.raises(ConfigError, match=r"^trained: expected 'all', 'mlps' or 'nothing' for a dense model"):
        bytes_needed(config, 1, 1, "gates")
