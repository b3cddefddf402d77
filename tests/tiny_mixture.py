"""Specs of mixtures on the tiny data set: two experts, each run trained in less than a second."""

from __future__ import annotations

from backdoorbench_moe.config import RunSpec, build_spec

TRAIN = {"epochs": 2, "batch_size": 32, "optimizer": "adamw", "lr": 0.003}


def mixture_spec(**values: object) -> RunSpec:
    """A mixture of two experts, of which an attacker provides expert 1; any key may be given."""
    base = {
        "attack": {"name": "moevil", "epochs": 1},
        "dataset": "tiny",
        "model": {"name": "convnext", "features": 8, "depth": 2},
        "trigger": {"name": "square", "size": 2},
        "precision": "fp32",
        "policy": 0.25,
        "splitter": {"name": "domains", "domains": ["plain", "inverted", "rotated"]},
        "mixture": {
            "experts": 2,
            "poisoned_experts": [1],
            "expert_train": {**TRAIN, "epochs": 2},
            "gate_train": {**TRAIN, "lr": 0.1},
        },
        "train": TRAIN,
    }
    return build_spec(base, values)
