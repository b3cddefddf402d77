"""A suite on the tiny data set, for the tests."""

from __future__ import annotations

from typing import Any

from tiny import TINY_MODEL

from backdoorbench_moe.bench.suites.reading import parse_suite
from backdoorbench_moe.bench.suites.suite import Suite

BASE = {
    "recipe": "paper",
    "dataset": "tiny",
    "model": TINY_MODEL,
    "precision": "fp32",
    "train": {"epochs": 2, "batch_size": 32},
}
GRID = {
    "applicator": ["image"],
    "trigger": [{"name": "square", "size": 4}, "blend"],
    "poison.rate": [0.25, "50%"],
}


def tiny_suite(scale: str | None = None, **values: Any) -> Suite:
    """Four cells; any key of a suite may be given."""
    given = {"title": "Tiny", "version": 1, "base": BASE, "grid": GRID, **values}
    return parse_suite(given, "tiny", scale)
