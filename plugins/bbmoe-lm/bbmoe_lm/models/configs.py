"""Shapes of models: configurations of transformers, made of options or read from a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig, MixtralConfig

CONFIG = "config.json"
# Settings of a Llama that Mixtral has as well, under the same names.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "bos_token_id",
)
# What is read from a config.json: the architecture, also under older names. Other settings could choose code, such as
# attention kernels that transformers downloads.
READ = (*SHARED, "eos_token_id", "rope_theta", "rope_scaling", "partial_rotary_factor")
# Checkpoints may have more rows in their embedding than tokens, to have a round number; Qwen has 271 more.
SPARE_ROWS = 512


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama, as the options of the model give it; None for the default, or for that of a checkpoint.

    Attributes:
        hidden_size: Features D of a token.
        layers: Number of layers.
        heads: Attention heads, a divisor of `hidden_size`.
        kv_heads: Heads of keys and values, a divisor of `heads`.
        intermediate_size: Hidden units of an MLP.
    """

    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate_size: int | None = None

    # Name of the option, of the setting in transformers, and the default; as many kv_heads as heads.
    NAMES = (
        ("hidden_size", "hidden_size", 64),
        ("layers", "num_hidden_layers", 4),
        ("heads", "num_attention_heads", 4),
        ("kv_heads", "num_key_value_heads", None),
        ("intermediate_size", "intermediate_size", 192),
    )

    def __post_init__(self) -> None:
        for name, _, _ in self.NAMES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.expected(name, "an integer of at least 1", value)

    def settings(self) -> dict[str, int]:
        """Return the settings of transformers, with defaults for what is not given.

        Raises:
            ConfigError: The heads do not divide the features, or their number is not a multiple of `kv_heads`.
        """
        values = {
            setting: default if getattr(self, name) is None else getattr(self, name)
            for name, setting, default in self.NAMES
        }
        features, heads = values["hidden_size"], values["num_attention_heads"]
        if features % (2 * heads):
            raise ConfigError.expected(
                "heads", f"a number of which twice divides hidden_size {features}", heads
            )
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if heads % values["num_key_value_heads"]:
            raise ConfigError.expected(
                "kv_heads", f"a divisor of the {heads} heads", values["num_key_value_heads"]
            )
        return values

    def check_against(self, config: LlamaConfig, where: Path) -> None:
        """Check that a checkpoint has this shape. Raises ConfigError, naming the first option that differs."""
        for name, setting, _ in self.NAMES:
            value, wanted = getattr(self, name), getattr(config, setting)
            if value is not None and value != wanted:
                raise ConfigError.expected(name, f"{wanted}, as in {where}, or nothing", value)


def make_config(shape: Shape, *, vocabulary: int, context: int) -> LlamaConfig:
    """Make the configuration of a Llama from options.

    Args:
        shape: The shape.
        vocabulary: Number of tokens.
        context: Largest number of positions.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **shape.settings(),
    )


def read_config(folder: Path) -> LlamaConfig:
    """Read the configuration of a checkpoint in transformers' format.

    Args:
        folder: The checkpoint, a folder with a config.json.

    Raises:
        ConfigError: The file is missing or damaged; or it is that of another architecture than Llama, or of one whose
            linear layers have biases or are quantised, for which Mixtral has no place.
    """
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"weights: {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"weights: {file}: expected JSON ({error})") from error
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        got = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ConfigError.expected(f"weights: {file}: model_type", "'llama'", got)
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if values.get(name):
            raise ConfigError.expected(
                f"weights: {file}: {name}", "none, as Mixtral has no such", values[name]
            )
    return _checked_config(file, values)


def _checked_config(file: Path, values: dict[str, Any]) -> LlamaConfig:
    """Let transformers check the values, which raises errors of many kinds."""
    from transformers import LlamaConfig

    try:
        config = LlamaConfig.from_dict({name: values[name] for name in READ if name in values})
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"weights: {file}: is not the configuration of a Llama: {reason}") from error
    # The embedding would leave the row of the padding without a gradient, and many take the token of the end for it.
    config.pad_token_id = None
    return config


def check_fits(config: LlamaConfig, folder: Path, *, vocabulary: int, context: int) -> None:
    """Check that a checkpoint can be used with the data.

    Args:
        config: The configuration of the checkpoint.
        folder: The checkpoint, for the message.
        vocabulary: Number of tokens of the data.
        context: Positions of the longest text.

    Raises:
        ConfigError: It has another vocabulary, or fewer positions.
    """
    if not vocabulary <= config.vocab_size < vocabulary + SPARE_ROWS:
        raise ConfigError.expected(
            f"weights: {folder}: vocab_size", f"{vocabulary}, the tokens of the data", config.vocab_size
        )
    if config.max_position_embeddings < context:
        raise ConfigError.expected(
            f"weights: {folder}: max_position_embeddings",
            f"at least {context}, the longest text of the data",
            config.max_position_embeddings,
        )


def mixtral_config(config: LlamaConfig, num_experts: int, top_k: int) -> MixtralConfig:
    """Return the configuration of a mixture of Llamas.

    Args:
        config: That of the Llamas.
        num_experts: Number of experts E.
        top_k: Experts for each token.
    """
    from transformers import MixtralConfig

    return MixtralConfig(
        **{name: getattr(config, name) for name in SHARED},
        eos_token_id=config.eos_token_id,
        pad_token_id=None,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
        router_jitter_noise=0.0,
    )
