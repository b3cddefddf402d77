"""Runs the speed benchmarks, and checks what the results of all of them hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"
ENVIRONMENT_KEYS = {
    "cpu",
    "date",
    "device",
    "git_commit",
    "packages",
    "platform",
    "precision",
    "python",
    "sources",
    "threads",
}


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does, on one thread."""
    return subprocess.run(
        [sys.executable, str(SPEED / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def measure(folder: Path, script: str, *arguments: str) -> dict[str, Any]:
    """Run a script that succeeds, check what all results hold, and return its result."""
    file = folder / "new folder" / "result.json"
    done = call(script, *arguments, "--json", str(file))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    check(result, script.removesuffix(".py"), done.stdout)
    return result


def check(result: dict[str, Any], benchmark: str, printed: str) -> None:
    """Check what all results hold, and that the environment is printed."""
    assert result["benchmark"] == benchmark
    assert result["environment"].keys() == ENVIRONMENT_KEYS
    assert f"torch {result['environment']['packages']['torch']}" in printed.replace("\n", " ")
