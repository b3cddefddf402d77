"""What several defenses ask of their options and of a model."""

from __future__ import annotations

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.structure import Structured


def check_tuning(epochs: int, lr: float | None, *, at_least: int) -> None:
    """Raise ConfigError for fewer epochs than `at_least`, or a learning rate that is none."""
    if epochs < at_least:
        raise ConfigError.expected("epochs", f"a whole number from {at_least}", epochs)
    if lr is not None and not 0 < lr < float("inf"):
        raise ConfigError.expected("lr", "a positive number", lr)


def structure(model: object) -> Structured:
    """The model as one that names its parts. Raises ConfigError if it does not."""
    if not isinstance(model, Structured):
        raise ConfigError(
            f"scope: the model {type(model).__name__} does not name its parts: "
            "expected methods `components` and `prunable` (see backdoorbench_moe.ops.structure)"
        )
    return model
