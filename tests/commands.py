"""Commands as processes that are signalled, and whose output goes where it cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SIGNS = [
    *("--dataset", "signs", "--set", "dataset.train_images=640", "--set", "dataset.test_images=100"),
    *("--set", "model.widen_factor=1", "--set", "model.moe_channels=8", "--set", "model.expert_channels=4"),
    *("--precision", "fp32", "--trigger", "square", "--device", "cpu"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: object) -> list[str]:
    """`bbmoe` with these words, in a process of its own."""
    return [sys.executable, "-m", "backdoorbench_moe", *map(str, words)]


def call(
    *words: object, env: Mapping[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[bytes]:
    """Run `bbmoe`; the output as bytes, whatever its encoding."""
    return subprocess.run(
        command(*words), stderr=subprocess.PIPE, env={**ENVIRONMENT, **(env or {})}, check=False, **options
    )


def stopped(
    words: Sequence[object],
    when: Callable[[], bool],
    number: int = signal.SIGTERM,
    *,
    times: int = 1,
    group: bool = False,
    prefix: Sequence[str] = (),
) -> tuple[int, str]:
    """Start `bbmoe`, send it a signal once `when` says so, and give its exit code and what it said."""
    process = subprocess.Popen(
        [*prefix, *command(*words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=_default_signals,
    )
    end = time.time() + 120
    while not when():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)
    for _ in range(times):
        (os.killpg if group else os.kill)(process.pid, number)
    try:
        out, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # It would go on beside the other tests.
        raise
    return process.returncode, out


def _default_signals() -> None:
    """Undo what the tests inherit: run under nohup, they ignore SIGHUP, and so would the processes they start."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def any_file(output: Path, pattern: str) -> Callable[[], bool]:
    """Whether a file of this name is there."""
    return lambda: any(output.glob(pattern))
