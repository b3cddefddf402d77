"""Running conformance tests of models over classes that are not registered."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import settle


def names_of(tests: ModuleType) -> list[str]:
    """Names of the tests of a module, without "test_"."""
    return [name.removeprefix("test_") for name in vars(tests) if name.startswith("test_")]


def run(tests: ModuleType, name: str, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one test of a module over models of a class."""

    def make(_: str, *, seed: int = 0) -> nn.Module:
        with seeded(seed, "init"):
            return settle(kind()).to(memory_format=torch.channels_last)

    monkeypatch.setattr(tests, "used_model", make)
    getattr(tests, f"test_{name}")("under test")
