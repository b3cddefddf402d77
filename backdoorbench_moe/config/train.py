"""Settings of a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Literal

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.options import convert_fields


@dataclass(frozen=True)
class TrainSpec:
    """Settings of the training.

    Args:
        epochs: Number of passes over the training set, at least 1.
        batch_size: Images per step, at least 1; the last batch of an epoch may be smaller.
        optimizer: "sgd" or "adamw".
        lr: Peak learning rate, above 0.
        momentum: Momentum of SGD, in [0, 1); ignored by AdamW.
        nesterov: Whether SGD uses Nesterov momentum; `momentum` must then be above 0.
        weight_decay: Weight decay, at least 0; not applied to biases and the parameters of norms.
        schedule: "constant" learning rate; or "one-cycle": it rises linearly to `lr` during the warmup and then falls
            linearly to 0.
        warmup: Share of all steps that are the warmup of "one-cycle", in [0, 1).

    Raises:
        ConfigError: A value is out of range.
    """

    epochs: int = 25
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    warmup: float = 0.25

    def __post_init__(self) -> None:
        convert_fields(self, "train.", (item.name for item in fields(self)))
        checks = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (0 < self.lr < float("inf"), "a positive number"),
            "momentum": (0 <= self.momentum < 1, "a number in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "a number of at least 0"),
            "warmup": (0 <= self.warmup < 1, "a number in [0, 1)"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError.expected(f"train.{name}", expected, getattr(self, name))
        if self.nesterov and self.optimizer == "sgd" and not self.momentum:
            raise ConfigError.expected("train.momentum", "a positive number where train.nesterov is set", 0)

    def to_dict(self) -> Values:
        """Return the values as a plain dict."""
        return asdict(self)
