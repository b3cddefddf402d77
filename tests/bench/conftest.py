"""The fixture that the tests of the local engine share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from commands import FORKS

from backdoorbench_moe.bench.running.engines import local


@pytest.fixture
def forks(monkeypatch) -> None:
    """Fork the workers from a process that has imported torch, so that each need not import it.

    For tests of what the engine does with its workers. Those of signals spawn them as the engine does for a user: a
    spawned process inherits the signals that the engine blocks.
    """
    monkeypatch.setattr(local, "multiprocessing", SimpleNamespace(get_context=lambda _: FORKS))
