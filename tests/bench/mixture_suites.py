"""A suite of mixtures on the tiny data set, in seconds."""

from __future__ import annotations

from typing import Any

from backdoorbench_moe.bench.suites.reading import parse_suite
from backdoorbench_moe.bench.suites.suite import Suite

QUICK = {"epochs": 1, "batch_size": 32}
BASE = {
    "recipe": "quick",
    "dataset": "tiny",
    "model": {"name": "convnext", "features": 8, "depth": 2},
    "splitter": {"name": "domains", "domains": ["plain", "inverted"]},
    "policy": 0.25,
    "precision": "fp32",
    "train": QUICK,
    "mixture": {"experts": 2, "expert_train": QUICK, "gate_train": QUICK},
}
GATES = {"gate": ["top-k", "soft"]}
POISONED = {"mixture.poisoned_experts": [[1]]}
GRID = [{**GATES, "attack": None}, {**GATES, "attack": ["expert-tuning", "moevil"], **POISONED}]
TABLES = [
    {
        "title": "Harm",
        "rows": ["gate", "attack.name"],
        "columns": "metric",
        "metrics": ["asr", "twin_asr", "unsafe", "alone_asr", "overall", "own_share"],
        "no_trigger": False,
    }
]


def mixture_suite(**values: Any) -> Suite:
    """Two gates, each with no attack, a control and MoEvil; any key of a suite may be given."""
    given = {"title": "Mixtures", "version": 1, "base": BASE, "grid": GRID, "tables": TABLES, **values}
    return parse_suite(given, "mixtures", None)
