"""Base class of the models: wraps a causal language model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from backdoorbench_moe.moe.layers import ignored
from backdoorbench_moe.moe.structure import ChannelGroup
from bbmoe_lm.models.generation import continue_greedily

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalModel(nn.Module):
    """A causal language model of transformers whose blocks have an MLP called `mlp`.

    Texts are padded on the right. Since attention is causal, padding does not affect the tokens before it, and no
    attention mask is needed.

    Args:
        network: A `LlamaForCausalLM` or `MixtralForCausalLM`.
        padding: Id of the padding token.
    """

    data_options: ClassVar[tuple[str, ...]] = ("vocabulary", "context", "padding")
    tiny: ClassVar[Mapping[str, object]] = {
        "hidden_size": 16,
        "layers": 2,
        "heads": 2,
        "intermediate_size": 24,
    }

    def __init__(self, network: PreTrainedModel, padding: int) -> None:
        super().__init__()
        self.network, self.padding = network, padding

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) int64 to logits (B, T, vocabulary) of the next token at each position."""
        with ignored(self.padded(tokens)):
            logits: Tensor = self.network(input_ids=tokens, use_cache=False).logits
        return logits

    def padded(self, tokens: Tensor) -> Tensor:
        """Return which positions of tokens (B, T) are padding, (B, T) bool: the trailing positions with its id."""
        return (tokens != self.padding).flip(1).cumsum(1).flip(1) == 0

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLPs by dotted name, first layer first; see `moe.structure.WithMLPs`."""
        layers = self.network.get_submodule("model.layers")
        return {f"network.model.layers.{n}.mlp": layer.get_submodule("mlp") for n, layer in enumerate(layers)}

    def generate(self, tokens: Tensor, lengths: Tensor, new_tokens: int, end: int) -> Tensor:
        """Continue texts greedily; see `moe.structure.Generates`."""
        return continue_greedily(self.network, tokens, lengths, new_tokens=new_tokens, end=end)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the head; see `moe.structure.Structured`. Its weights may be tied to the embedding."""
        return {"head": [self.network.get_submodule("lm_head")]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the hidden units of the last MLP; see `moe.structure.Structured`."""
        [*_, last] = self.mlps().values()
        return {"trunk": [ChannelGroup.whole("trunk", last.get_submodule("gate_proj"))]}
