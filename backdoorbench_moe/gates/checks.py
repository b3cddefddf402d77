"""Checks of the options of gates."""

from __future__ import annotations

import math

from backdoorbench_moe.errors import ConfigError


def check_not_negative(gate: str, **values: float) -> None:
    """Check that numbers are finite and at least 0.

    Args:
        gate: Name of the gate, for the error message.
        **values: The numbers by name of the option.

    Raises:
        ConfigError: A number is negative, infinite or NaN.
    """
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError.expected(f"{gate}: {name}", "a finite number of at least 0", value)


def check_top_k(gate: str, top_k: int, num_experts: int | None = None) -> None:
    """Check the number of experts for each token.

    Args:
        gate: Name of the gate, for the error message.
        top_k: Experts for each token.
        num_experts: Number of experts E; None if it is not known yet.

    Raises:
        ConfigError: `top_k` is not in 1..E.
    """
    if top_k < 1 or (num_experts is not None and top_k > num_experts):
        most = "E" if num_experts is None else num_experts
        raise ConfigError.expected(f"{gate}: top_k", f"1 to {most}, the number of experts", top_k)
