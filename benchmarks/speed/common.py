"""Shared code of the speed benchmarks: options, child processes, and output of results.

Does not import torch at the top: a child's peak memory is never below that of its parent when the child was started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SMALL_PMOE: dict[str, Any] = {"widen_factor": 2, "moe_channels": 128, "expert_channels": 32}
# These libraries choose their kernels by the features of the CPU; the variables exclude AVX-512.
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# Linux counts ru_maxrss in KiB, macOS in bytes.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Child:
    """A finished process: wall seconds, CPU seconds and peak resident bytes, including its own children."""

    returncode: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    return parser


def at_least_one(text: str) -> int:
    """Read a count, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def run_child(command: Sequence[str], *, quiet: bool, variables: Mapping[str, str] | None = None) -> Child:
    """Run a process to its end.

    Args:
        command: Program and arguments.
        quiet: Whether to discard its output.
        variables: Environment variables to set.
    """
    output = subprocess.DEVNULL if quiet else None
    started = time.perf_counter()
    environment = {**os.environ, **(variables or {})}
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Child(process.returncode, seconds, cpu_seconds, usage.ru_maxrss * MAXRSS_UNIT)


def bbmoe_command() -> list[str]:
    """Return the command of this interpreter's `bbmoe`, or of the module if it is not installed."""
    script = Path(sysconfig.get_path("scripts")) / "bbmoe"
    return [str(script)] if script.is_file() else [sys.executable, "-m", "backdoorbench_moe"]


def environment_of(device: str = "cpu", precision: str = "auto") -> dict[str, Any]:
    """Return the environment in the format of a run's record."""
    from backdoorbench_moe.engine.device import environment, resolve_device, resolve_precision

    where = resolve_device(device)
    return environment(where, resolve_precision(precision, where))


def finish(result: dict[str, Any], table: Table, notes: Sequence[str], file: Path | None) -> None:
    """Print the table, the notes and the environment; write the result to the file of --json, if given."""
    console = Console(highlight=False)
    console.print(table)
    for note in notes:
        console.print(note, markup=False)
    console.print(footer(result["environment"]), style="dim", markup=False)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def footer(environment: Mapping[str, Any]) -> str:
    """Return versions and hardware in one line."""
    device = "" if environment["device"] == "cpu" else f", {environment['device']}"
    return (
        f"torch {environment['packages']['torch']}, Python {environment['python']}, "
        f"{environment['cpu']}, {environment['threads']} threads{device}, "
        f"commit {environment['git_commit'] or 'unknown'}"
    )


def met(goal: bool) -> str:
    """Return in a word whether a goal was met."""
    return "met" if goal else "missed"


def verdict(goal: bool) -> str:
    """Return the table cell of a goal: the word of `met` with a colour."""
    return f"[{'green' if goal else 'red'}]{met(goal)}[/]"
