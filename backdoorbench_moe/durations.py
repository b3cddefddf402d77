"""Durations in human-readable form."""

from __future__ import annotations

import math

from backdoorbench_moe.errors import ConfigError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def say_time(seconds: float) -> str:
    """Format a duration with a suitable unit: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parse_budget(text: str) -> float:
    """Convert "90s", "9m", "1h30m" or "2d" to seconds. Raises ConfigError."""
    total, number = 0.0, ""
    for letter in text.strip():
        if letter in UNITS and number:
            try:
                total, number = total + float(number) * UNITS[letter], ""
            except ValueError:
                break
        else:
            number += letter
    if number or not 0 < total < math.inf:
        raise ConfigError.expected("--budget", "a time such as 90s, 9m or 1h30m", text)
    return total
