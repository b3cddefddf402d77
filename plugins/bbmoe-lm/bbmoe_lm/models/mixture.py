"""Mixtures of Llamas, which are exported as Mixtral checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.layers import GatedMLPExperts, Router, SampleTop1Router, TopKSoftmaxRouter
from backdoorbench_moe.moe.layers import MoELayer as Layer
from backdoorbench_moe.moe.merging import MergedModel
from bbmoe_lm.models.causal import CausalModel
from bbmoe_lm.models.configs import mixtral_config

if TYPE_CHECKING:
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel


class LlamaMixture(MergedModel):
    """E Llamas that share all weights except their MLPs: a `MixtralForCausalLM` with the toolbox's MoE layers.

    The layers replace Mixtral's and compute the same function. They can also mask and mute experts, report the routing
    of every position, and have gates that Mixtral lacks. Padding is ignored in routing and losses.

    All experts start as copies of the dense model's MLPs.

    Args:
        dense: A dense model with a `LlamaForCausalLM`.
        num_experts: Number of experts E, at least 1.
        gate: Builds the router of one layer from the number of features D and E.

    Raises:
        ConfigError: E is below 1.
    """

    network: CausalModel

    def __init__(self, dense: CausalModel, num_experts: int, gate: Callable[[int, int], Router]) -> None:
        if num_experts < 1:
            raise ConfigError.expected("num_experts", "an integer of at least 1", num_experts)
        body = CausalModel(_with_mixtrals_blocks(dense.network, num_experts), dense.padding)
        super().__init__(body, num_experts, gate)
        self.train(dense.training)

    def write_checkpoint(self, folder: Path, *, end: int, header: Mapping[str, str]) -> None:
        """Write the mixture as a Mixtral checkpoint; see `save_checkpoint` and `models.base.WritesCheckpoints`."""
        save_checkpoint(self, folder, end=end, header=header)

    def generate(self, tokens: Tensor, lengths: Tensor, new_tokens: int, end: int) -> Tensor:
        """Continue texts greedily; see `moe.structure.Generates`. Sampling gates sample experts here, too."""
        return self.network.generate(tokens, lengths, new_tokens, end)


def _with_mixtrals_blocks(llama: PreTrainedModel, num_experts: int) -> MixtralForCausalLM:
    """Return a Mixtral that shares the weights and MLPs of a Llama, which is not changed."""
    mixtral = _empty_mixtral(mixtral_config(llama.config, num_experts, min(2, num_experts)))
    for own, other in zip(mixtral.model.layers, llama.get_submodule("model.layers"), strict=True):
        own.mlp = other.mlp
    outside = {name: tensor for name, tensor in llama.state_dict().items() if ".mlp." not in name}
    mixtral.load_state_dict(outside, assign=True, strict=False)
    mixtral.tie_weights()
    return mixtral


def _empty_mixtral(config: MixtralConfig) -> MixtralForCausalLM:
    """Return a Mixtral whose weights are on the meta device."""
    from transformers import MixtralForCausalLM

    with torch.device("meta"):
        mixtral = MixtralForCausalLM(config)
    # The rotary frequencies are not in the state dict; they follow from the configuration.
    mixtral.model.rotary_emb = type(mixtral.model.rotary_emb)(config)
    return mixtral


def _assign(mixtral: MixtralForCausalLM, state: Mapping[str, Tensor]) -> None:
    mixtral.load_state_dict(state, assign=True)
    mixtral.tie_weights()


def to_mixtral(mixture: LlamaMixture) -> MixtralForCausalLM:
    """Convert a mixture to a Mixtral of transformers on the CPU, which computes the same function.

    Muted experts get output weights of zero.

    Args:
        mixture: The mixture. Its gate must be a softmax over the chosen experts, or sample one expert for each token;
            then the Mixtral chooses the most probable one.

    Raises:
        ConfigError: An expert is masked, or the gate is of another type; Mixtral supports neither.
    """
    layers = mixture.layers()
    [top_k, *others] = {_top_k(layer.router) for layer in layers}
    assert not others
    network = mixture.network.network
    state = {name: tensor for name, tensor in network.state_dict().items() if ".mlp." not in name}
    for layer in layers:
        name = layer.name.removeprefix("network.network.")
        state |= {f"{name}.{part}": tensor for part, tensor in _mixtrals_tensors(layer).items()}
    config = network.config.__class__.from_dict({**network.config.to_dict(), "num_experts_per_tok": top_k})
    mixtral = _empty_mixtral(config)
    _assign(mixtral, {name: tensor.detach().cpu().clone() for name, tensor in state.items()})
    return mixtral.eval()


def _top_k(router: nn.Module) -> int:
    if isinstance(router, TopKSoftmaxRouter):
        return router.top_k
    if isinstance(router, SampleTop1Router):
        return 1
    raise ConfigError(
        f"gate: {type(router).__name__} cannot be written as a Mixtral, whose gate is a softmax over the largest logits"
    )


def _mixtrals_tensors(layer: Layer) -> dict[str, Tensor]:
    """Return the weights of a layer by their names in Mixtral."""
    experts, router = cast(GatedMLPExperts, layer.experts), cast(Router, layer.router)
    if router.masked.any():
        raise ConfigError(f"{layer.name}: expected no masked expert, as Mixtral's router cannot exclude one")
    return {
        "gate.weight": router.get_parameter("weight"),
        "experts.gate_up_proj": torch.cat([experts.gate_proj.weights, experts.up_proj.weights], dim=1),
        "experts.down_proj": experts.down_proj.weights * experts.heard[:, None, None],
    }


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _special_tokens(network: Any, end: int | list[int] | None, padding: int) -> Iterator[None]:
    """Set the ids of end and padding. `generate` of transformers reads them from the generation configuration."""
    configs = network.config, network.generation_config
    own = [(config.eos_token_id, config.pad_token_id) for config in configs]
    try:
        for config in configs:
            config.eos_token_id, config.pad_token_id = end, padding
        yield
    finally:
        for config, ids in zip(configs, own, strict=True):
            config.eos_token_id, config.pad_token_id = ids


def _add_header(file: Path, header: Mapping[str, str]) -> None:
    """Rewrite a safetensors file with more metadata in its header."""
    with safe_open(file, "pt") as opened:
        texts = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={**texts, **header})
    partial.replace(file)


def save_checkpoint(
    model: CausalModel | LlamaMixture,
    folder: Path,
    *,
    end: int | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a model as a checkpoint in transformers' format.

    Args:
        model: A Llama, or a mixture of Llamas, which is written as a Mixtral.
        folder: A new or empty folder.
        end: Id of the end token, for the configuration. None to keep that of the model.
        header: Additional metadata for the headers of the weight files.

    Raises:
        ConfigError: The folder is not empty or cannot be written, or the mixture cannot be converted; see `to_mixtral`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError.expected("folder", "a new or empty folder", str(folder))
    mixture = isinstance(model, LlamaMixture)
    network: Any = to_mixtral(model) if mixture else model.network
    padding = model.network.padding if mixture else model.padding
    ending = network.config.eos_token_id if end is None else end
    try:
        with _without_progress_bar(), _special_tokens(network, ending, padding):
            network.save_pretrained(folder)
        for file in sorted(folder.glob("*.safetensors")) if header else ():
            _add_header(file, header or {})
    except OSError as error:
        raise ConfigError(f"folder: {folder}: {error.strerror or error}") from error
