"""The fixtures that the tests of the speed benchmarks share."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from commands import FORKS
from speed_scripts import SPEED, check


@pytest.fixture
def scripts(monkeypatch) -> Callable[[str], Any]:
    """The module of a script, which its processes can import."""
    monkeypatch.syspath_prepend(str(SPEED))
    return importlib.import_module


@pytest.fixture
def forks(monkeypatch) -> Callable[[Any], None]:
    """Fork the processes that a script spawns from one that has imported torch, so that each need not import it."""

    def patch(script: Any) -> None:
        monkeypatch.setattr(script, "multiprocessing", SimpleNamespace(get_context=lambda _: FORKS))

    return patch


@pytest.fixture
def measure_here(monkeypatch, tmp_path, capsys) -> Callable[..., dict[str, Any]]:
    """Run a script's `main` in this process, which need not import torch again, and return its result."""

    def run(script: Any, *arguments: str) -> dict[str, Any]:
        file = tmp_path / "new folder" / "result.json"
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments, "--json", str(file)])
        script.main()
        result: dict[str, Any] = json.loads(file.read_text())
        check(result, script.__name__, capsys.readouterr().out)
        return result

    return run
