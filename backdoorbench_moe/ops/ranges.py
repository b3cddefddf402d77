"""Checks that numeric options are in range."""

from __future__ import annotations

from backdoorbench_moe.config.train import MOST_EPOCHS
from backdoorbench_moe.errors import ConfigError

# Far more runs than anyone trains; lists of more would fill the memory before the first run starts.
MOST_REPEATS = 10_000
# The bound of numbers without a bound of their own. Larger ones are slips, and may exceed the integers of PyTorch.
LARGEST = 1_000_000_000


def check_integer(name: str, number: int | None, at_least: int = 0, at_most: int | None = None) -> None:
    """Raise ConfigError if a number, such as a number of steps, is too small or too large; None is allowed.

    Without `at_most`, numbers of epochs are at most `MOST_EPOCHS`, and others at most `LARGEST`.
    """
    if number is None:
        return
    if at_most is not None and not at_least <= number <= at_most:
        raise ConfigError.expected(name, f"an integer from {at_least} to {at_most}", number)
    if number < at_least:
        raise ConfigError.expected(name, f"an integer of at least {at_least}", number)
    most = MOST_EPOCHS if name.endswith("epochs") else LARGEST
    if at_most is None and number > most:
        raise ConfigError.expected(name, f"an integer of at most {most}", number)


def check_repeats(name: str, repeats: int) -> None:
    """Raise ConfigError if a number of seeds is not from 1 to `MOST_REPEATS`."""
    if repeats < 1:
        raise ConfigError.expected(name, "at least 1", repeats)
    if repeats > MOST_REPEATS:
        raise ConfigError.expected(name, f"at most {MOST_REPEATS}", repeats)


def check_interval(name: str, number: float, interval: str) -> None:
    """Raise ConfigError if a number is not in an interval.

    Args:
        name: Name of the option.
        number: Its value.
        interval: Such as "(0, 1]", which includes 1 but not 0.
    """
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval.startswith("[") else number > low
    below = number <= high if interval.endswith("]") else number < high
    if not (above and below):
        raise ConfigError.expected(name, f"a number in {interval}", number)


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
        check_interval(name, number, "[0, 1]")
