"""Estimating the memory of a base and its mixture before they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from backdoorbench_moe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig

Trained = Literal["all", "mlps", "gates", "nothing"]
FLOAT = 4
# Numbers that AdamW keeps for each weight: the means of the gradient and of its square.
ADAMW_STATES = 2
# Numbers that are kept for the backward pass, counted in float32 (see plugins/bbmoe-lm/tests/models/test_memory.py):
# for each token and layer, these multiples of the features and of the hidden units; for each expert that a token is
# routed to, also `DISPATCHED` times the features; and a few for each expert and each head.
KEPT_FEATURES, KEPT_HIDDEN, DISPATCHED, KEPT_EXPERTS, KEPT_HEADS = 10, 4, 3, 16, 2
# Logits, their log-softmax and its gradient.
LOGITS_TRAINED, LOGITS = 3, 1


@dataclass(frozen=True)
class Memory:
    """Memory by purpose, in bytes.

    Attributes:
        weights: The parameters, as float32. Exact.
        gradients: Their gradients. Exact.
        optimizer: The states of AdamW. Exact.
        activations: Other memory for a batch. An estimate: in float32, for attention that stores no (T, T) matrix.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        named = ", ".join(f"{part} {_gib(getattr(self, part))}" for part in parts)
        return f"{_gib(self.total)} GiB ({named})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def bytes_needed(
    config: LlamaConfig, batch: int, length: int, trained: Trained, *, experts: int = 0, top_k: int = 2
) -> Memory:
    """Estimate the memory of a model during training with AdamW, or inference.

    Args:
        config: The configuration of the Llama, or of the merged Llamas.
        batch: Batch size, at least 1.
        length: Number of positions T of a text, at least 1.
        trained: The weights that are trained: "all", the "mlps" (in a mixture, the experts), the "gates", or "nothing".
        experts: Number of experts E of the mixture; 0 for the dense model.
        top_k: Number of experts that process each token. On a GPU without a kernel for grouped matrix products (see
            `moe.layers.dispatching`), all E do in training.

    Raises:
        ConfigError: A number is out of range, or `trained` is "gates" for a dense model.
    """
    for name, value in (("batch", batch), ("length", length), ("top_k", top_k)):
        if value < 1:
            raise ConfigError.expected(name, "an integer of at least 1", value)
    if trained == "gates" and not experts:
        raise ConfigError.expected("trained", "'all', 'mlps' or 'nothing' for a dense model", trained)
    mlps, gates, rest = _counts(config, experts)
    learnt = {"all": mlps + gates + rest, "mlps": mlps, "gates": gates, "nothing": 0}[trained]
    tokens = batch * length
    return Memory(
        FLOAT * (mlps + gates + rest),
        FLOAT * learnt,
        FLOAT * ADAMW_STATES * learnt,
        FLOAT * tokens * _kept(config, experts, min(top_k, experts), learnt > 0),
    )


def _counts(config: LlamaConfig, experts: int) -> tuple[int, int, int]:
    """Return the numbers of weights in the MLPs, in the gates, and elsewhere."""
    features, layers = config.hidden_size, config.num_hidden_layers
    head = config.head_dim or features // config.num_attention_heads
    mlp = 3 * features * config.intermediate_size
    attention = 2 * features * head * (config.num_attention_heads + config.num_key_value_heads)
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * features
    return (
        layers * mlp * max(1, experts),
        layers * features * experts,
        layers * (attention + 2 * features) + features + tables,
    )


def _kept(config: LlamaConfig, experts: int, top_k: int, trained: bool) -> int:
    """Return how many numbers are in memory for each token of a batch."""
    wide = KEPT_FEATURES + DISPATCHED * top_k
    layer = wide * config.hidden_size + KEPT_HIDDEN * max(1, top_k) * config.intermediate_size
    layer += KEPT_EXPERTS * experts + KEPT_HEADS * config.num_attention_heads
    layers = config.num_hidden_layers if trained else 1
    return layers * layer + (LOGITS_TRAINED if trained else LOGITS) * config.vocab_size
