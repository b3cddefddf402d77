"""Commands as processes that are signalled, and whose output goes where it cannot be written."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from backdoorbench_moe import cli

SIGNS = [
    *("--dataset", "signs", "--set", "dataset.train_images=256", "--set", "dataset.test_images=100"),
    *("--set", "model.widen_factor=1", "--set", "model.moe_channels=8", "--set", "model.expert_channels=4"),
    *("--precision", "fp32", "--trigger", "square", "--device", "cpu"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# Importing torch takes seconds, and its compiler, which the first optimizer imports, takes as long again.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["backdoorbench_moe.cli.attack", "backdoorbench_moe.engine.runner", "torch._dynamo"]
)


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


class Forked:
    """`bbmoe` with these words, in a process of its own that is forked from one that has imported the package.

    For tests of what happens between the start and the end of Python. The process leads its own group.

    Args:
        *words: The words of the command.
        ignored: Signals that the process ignores from the start, as SIGHUP under `nohup`.
        path: Folders in which it and its own processes look for modules first.

    Attributes:
        pid: Number of the process.
    """

    def __init__(self, *words: object, ignored: Sequence[int] = (), path: Sequence[Path] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._streams:
            file.touch()
        self._process = FORKS.Process(target=_run, args=([*map(str, words)], self._streams, ignored, path))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        """What it has written to standard output until now."""
        return self._streams[0].read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """What it has written to standard error until now."""
        return self._streams[1].read_text(encoding="utf-8")

    def said(self) -> str:
        """What it has written until now."""
        return self.err + self.out

    def send(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to its group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait while the process runs."""
        end = time.monotonic() + 300
        while not condition():
            assert self._process.is_alive() and time.monotonic() < end, self.said()
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for the end of the process, and give its exit code."""
        self._process.join(500)  # A machine may be busy; pytest ends the test after 600.
        assert self._process.exitcode is not None, self.said()
        return self._process.exitcode

    def kill(self) -> None:
        """Kill what is left of the process and its group, which would go on beside the other tests."""
        if self._process.is_alive():
            # It may not lead its group yet, or may have just ended.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
        self._process.join()


def _run(words: list[str], streams: list[Path], ignored: Sequence[int], path: Sequence[Path]) -> None:
    os.setsid()
    for number in SIGNALS:  # Run under nohup, the tests ignore SIGHUP, and so would the processes they start.
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else usual)
    for number, stream in enumerate(streams, 1):
        with stream.open("ab") as file:
            os.dup2(file.fileno(), number)
    folders = [str(folder) for folder in path]
    sys.path[:0] = folders
    search = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(search)
    sys.argv = ["bbmoe", *words]
    cli.main()


@contextlib.contextmanager
def forked(*words: object, ignored: Sequence[int] = (), path: Sequence[Path] = ()) -> Iterator[Forked]:
    """Start a `Forked` process, and kill it at the end of the block if it still runs."""
    process = Forked(*words, ignored=ignored, path=path)
    try:
        yield process
    finally:
        process.kill()


def stopped(
    words: Sequence[object],
    when: Callable[[], bool],
    number: int = signal.SIGTERM,
    *,
    times: int = 1,
    group: bool = False,
) -> tuple[int, str]:
    """Send a `Forked` process a signal once `when` says so, and give its exit code and what it said."""
    with forked(*words) as process:
        process.wait_until(when)
        for _ in range(times):
            process.send(number, group=group)
        return process.end(), process.said()


def any_file(output: Path, pattern: str) -> Callable[[], bool]:
    """Whether a file of this name is there."""
    return lambda: any(output.glob(pattern))
