"""Checks that numeric options are in range."""

from __future__ import annotations

from backdoorbench_moe.errors import ConfigError


def check_epochs(name: str, epochs: int, at_least: int = 0) -> None:
    """Raise ConfigError if there are too few epochs."""
    if epochs < at_least:
        raise ConfigError.expected(name, f"an integer of at least {at_least}", epochs)


def check_positive(**numbers: float | None) -> None:
    """Raise ConfigError if one of the numbers is not above 0 and finite; None is allowed."""
    for name, number in numbers.items():
        if number is not None and not 0 < number < float("inf"):
            raise ConfigError.expected(name, "a positive number", number)


def check_weight(**numbers: float | None) -> None:
    """Raise ConfigError if one of the numbers is not at least 0 and finite; None is allowed."""
    for name, number in numbers.items():
        if number is not None and not 0 <= number < float("inf"):
            raise ConfigError.expected(name, "a number of at least 0", number)


def check_share(**numbers: float) -> None:
    """Raise ConfigError if one of the numbers is not in [0, 1]."""
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise ConfigError.expected(name, "a number in [0, 1]", number)
