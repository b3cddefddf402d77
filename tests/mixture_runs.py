"""Tiny mixtures: merged, with everything that they are made from, in seconds."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny_spec

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import run_attack

TRAINING = {"epochs": 1, "batch_size": 32, "lr": 0.01, "optimizer": "adamw"}


def mixture_spec(**values: object) -> RunSpec:
    """A mixture of two experts, the first one poisoned, on the tiny data set with a policy; any key may be given."""
    base: dict[str, object] = {
        "model": {"name": "convnext", "features": 8, "depth": 2},
        "attack": "hsft",
        "poison": {"rate": 0.0},
        "policy": 0.1,
        "splitter": {"name": "domains", "domains": ["rotated", "inverted"]},
        "gate": {"name": "top-k", "top_k": 1, "init_std": 1.0},
        "mixture": {
            "experts": 2, "poisoned_experts": [0], "expert_train": TRAINING, "gate_train": TRAINING
        },
        "train": {**TRAINING, "epochs": 2},
    }  # fmt: skip
    return tiny_spec(**{**base, **values})


def make_mixture(folder: Path, **values: object) -> dict[str, Run]:
    """Make a mixture in a folder; gives its run as "mixture", its clean twin as "twin", and its inputs by role."""
    [run] = run_attack(mixture_spec(**values), output=folder)
    found = {"mixture": run, "twin": load_run(folder / str(run.record.clean_twin))}
    return found | {each["role"]: load_run(folder / each["run"]) for each in run.record.inputs}
