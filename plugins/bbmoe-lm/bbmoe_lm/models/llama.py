"""The model `llama`: a dense language model with random weights or the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.base import Origin
from backdoorbench_moe.moe.layers import Router
from backdoorbench_moe.options import FolderPath
from bbmoe_lm.models.causal import CausalModel
from bbmoe_lm.models.checkpoints import checkpoint_folder, origin_of, read_state, weight_files
from bbmoe_lm.models.configs import CONFIG, Shape, check_fits, make_config, read_config
from bbmoe_lm.models.memory import Trained, bytes_needed
from bbmoe_lm.models.mixture import LlamaMixture, save_checkpoint


class Llama(CausalModel):
    """A Llama, `LlamaForCausalLM` of transformers. Merged with others, it becomes a Mixtral.

    With `weights`, the model has the shape of the checkpoint, whose config.json is read whenever the model is built.
    The weights are read as float32 when training starts; they are not needed to load a trained model.

    Args:
        vocabulary: Size of the vocabulary.
        context: Number of positions of the longest text.
        padding: Id of the padding token, which is on the right of shorter texts.
        hidden_size: Number of features of a token; None for 64.
        layers: Number of layers; None for 4.
        heads: Number of attention heads, each with an even number of features; None for 4.
        kv_heads: Number of key-value heads, a divisor of `heads`; None for the number of `heads`.
        intermediate_size: Number of hidden units of each MLP; None for 192.
        weights: Folder of a checkpoint in transformers' format with safetensors files, from which training starts. The
            shape options must be None or agree with it. None for random weights, drawn from the seed.

    Raises:
        ConfigError: An option is out of range; or the checkpoint is missing, damaged, pickled, not a Llama, or has
            another vocabulary or shape.

    Source:
        Touvron et al., "LLaMA: open and efficient foundation language models", arXiv 2302.13971, §2.2.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 64,
        context: int = 64,
        padding: int = 0,
        hidden_size: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        intermediate_size: int | None = None,
        weights: FolderPath | None = None,
    ) -> None:
        from transformers import LlamaForCausalLM

        _check_at_least_1(vocabulary=vocabulary, context=context)
        shape = Shape(hidden_size, layers, heads, kv_heads, intermediate_size)
        if weights is None:
            config = make_config(shape, vocabulary=vocabulary, context=context)
        else:
            folder = checkpoint_folder(weights)
            config = read_config(folder)
            shape.check_against(config, folder)
            check_fits(config, folder, vocabulary=vocabulary, context=context)
        try:
            network = LlamaForCausalLM(config)
        except (KeyError, ValueError) as error:  # A name in config.json that transformers does not know.
            if weights is None:
                raise
            raise ConfigError(
                f"weights: {folder / CONFIG}: transformers cannot build the model: {error}"
            ) from error
        super().__init__(network, padding)
        self.weights = weights

    def load_start(self) -> Origin | None:
        """Load the checkpoint in `weights`, if any; see `models.base.StartsFromFile`."""
        if self.weights is None:
            return None
        state, origin = self.read_checkpoint(self.weights)
        self.load_state_dict(state)
        return origin

    def check_checkpoint(self, path: str) -> None:
        """Check that a checkpoint, such as an expert's, has this shape; see `models.base.ReadsCheckpoints`."""
        folder = checkpoint_folder(path)
        other, config = read_config(folder), self.network.config
        shape = (setting for _, setting, _ in Shape.NAMES)
        for name in (*shape, "vocab_size", "rope_parameters", "rms_norm_eps", "hidden_act"):
            if getattr(other, name) != getattr(config, name):
                raise ConfigError.expected(
                    f"weights: {folder}: {name}", getattr(config, name), getattr(other, name)
                )
        weight_files(folder)

    def read_checkpoint(self, path: str) -> tuple[dict[str, Tensor], Origin]:
        """Read the weights of a checkpoint of this shape, such as an expert's; see `models.base.ReadsCheckpoints`.

        Raises:
            ConfigError: It is missing, damaged, pickled, or has another architecture or shape.
        """
        self.check_checkpoint(path)
        folder = checkpoint_folder(path)
        state = read_state(folder, self.network.state_dict())
        return {f"network.{name}": tensor for name, tensor in state.items()}, origin_of(folder)

    def write_checkpoint(self, folder: Path, *, end: int, header: Mapping[str, str]) -> None:
        """Write the model as a Llama; see `save_checkpoint` and `models.base.WritesCheckpoints`."""
        save_checkpoint(self, folder, end=end, header=header)

    def bytes_needed(
        self, batch: int, length: int, trained: Trained, *, experts: int = 0, top_k: int = 2
    ) -> int:
        """Estimate the memory of this model or a mixture of its copies, in bytes; see `models.base.SaysMemory`."""
        config: Any = self.network.config
        return bytes_needed(config, batch, length, trained, experts=experts, top_k=top_k).total

    def merge(self, num_experts: int, gate: Callable[[int, int], Router]) -> LlamaMixture:
        """Return a mixture of E copies of this model; see `moe.structure.MergesItself`."""
        return LlamaMixture(self, num_experts, gate)


def _check_at_least_1(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError.expected(name, "an integer of at least 1", value)
