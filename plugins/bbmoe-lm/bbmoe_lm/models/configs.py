"""Configurations of transformers, created from options or read from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig, MixtralConfig

CONFIG = "config.json"
# Settings that Llama and Mixtral share, under the same names.
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
# Settings that are read from a config.json: the architecture, also under older names. Others could select code, such as
# attention kernels that transformers downloads.
READ = (*SHARED, "eos_token_id", "rope_theta", "rope_scaling", "partial_rotary_factor")
# Embeddings may have more rows than there are tokens, to make the number round; Qwen has 271 more.
SPARE_ROWS = 512


@dataclass(frozen=True)
class Shape:
    """The shape options of a Llama; None for the default or the value of a checkpoint.

    Attributes:
        hidden_size: Number of features D of a token.
        layers: Number of layers.
        heads: Number of attention heads; `hidden_size` must be a multiple of twice this number.
        kv_heads: Number of key-value heads, a divisor of `heads`.
        intermediate_size: Number of hidden units of an MLP.
    """

    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate_size: int | None = None

    # Option, setting in transformers, and default. The default of kv_heads is the number of heads.
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
        """Return the settings for transformers, with defaults for options that are None.

        Raises:
            ConfigError: `hidden_size` is not a multiple of 2 `heads`, or `heads` not a multiple of `kv_heads`.
        """
        values = {
            setting: default if getattr(self, name) is None else getattr(self, name)
            for name, setting, default in self.NAMES
        }
        features, heads = values["hidden_size"], values["num_attention_heads"]
        if features % (2 * heads):
            raise ConfigError.expected(
                "heads", f"a number whose double divides hidden_size {features}", heads
            )
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if heads % values["num_key_value_heads"]:
            raise ConfigError.expected(
                "kv_heads", f"a divisor of the {heads} heads", values["num_key_value_heads"]
            )
        return values

    def check_against(self, config: LlamaConfig, where: Path) -> None:
        """Raise ConfigError if a checkpoint has another shape; the message names the first option that differs."""
        for name, setting, _ in self.NAMES:
            value, wanted = getattr(self, name), getattr(config, setting)
            if value is not None and value != wanted:
                raise ConfigError.expected(name, f"{wanted}, as in {where}, or nothing", value)


def make_config(shape: Shape, *, vocabulary: int, context: int) -> LlamaConfig:
    """Create the configuration of a Llama from options.

    Args:
        shape: The shape.
        vocabulary: Size of the vocabulary.
        context: Maximum number of positions.
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
        ConfigError: The file is missing or damaged, the architecture is not Llama, or the model has biases or quantized
            weights, which Mixtral does not support.
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
            raise ConfigError.expected(f"weights: {file}: {name}", "none, which Mixtral lacks", values[name])
    return _checked_config(file, values)


def _checked_config(file: Path, values: dict[str, Any]) -> LlamaConfig:
    """Create the configuration; transformers checks the values and raises errors of many types."""
    from transformers import LlamaConfig

    try:
        config = LlamaConfig.from_dict({name: values[name] for name in READ if name in values})
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"weights: {file}: is not the configuration of a Llama: {reason}") from error
    # With a padding id, the embedding of this token gets no gradient, and often it is the end token.
    config.pad_token_id = None
    return config


def check_fits(config: LlamaConfig, folder: Path, *, vocabulary: int, context: int) -> None:
    """Check that a checkpoint fits the data.

    Args:
        config: The configuration of the checkpoint.
        folder: The checkpoint, for the message.
        vocabulary: Size of the vocabulary of the data.
        context: Number of positions of the longest text.

    Raises:
        ConfigError: The vocabulary has another size, or there are too few positions.
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
        config: The configuration of the Llamas.
        num_experts: Number of experts E.
        top_k: Number of experts per token.
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
