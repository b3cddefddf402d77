"""Progress as plain lines of text."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TextIO

from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.wording.counting import count


class Tenths:
    """The progress of steps as a line at each tenth of the way."""

    def __init__(self) -> None:
        self._name = ""
        self._first = self._done = self._last = 0
        self._start = 0.0

    def line(self, name: str, done: int, total: int) -> str | None:
        """Return a line when `done` of `total` steps of `name` reach the next tenth, otherwise None.

        The time left is estimated from the time since the first call for this name.
        """
        if name != self._name or done < self._done:
            self._name, self._start = name, time.perf_counter()
            self._first, self._last = done, 0
        self._done = done
        tenth = 10 * done // max(1, total)
        if tenth <= self._last:
            return None
        self._last = tenth
        passed, steps = time.perf_counter() - self._start, done - self._first
        left = f", {passed / steps * (total - done):.0f} s left" if steps and done < total else ""
        return f"{name}: {10 * tenth}%{left}"


class AnnouncingObserver(Observer):
    """Converts `on_found`, `on_wait` and `on_progress` to messages: a wait once, and progress at each tenth."""

    def __init__(self) -> None:
        self._waited_for: str | None = None
        self._tenths = Tenths()

    def on_found(self, folder: str) -> None:
        """Announce a run that is already finished."""
        self.on_message(f"found finished: {folder}")

    def on_wait(self, folder: str) -> None:
        """Announce, once for each folder, that the run waits for another process."""
        if self._waited_for != folder:
            self._waited_for = folder
            self.on_message(f"waiting for another process in {folder}")

    def on_progress(self, name: str, done: int, total: int) -> None:
        """Announce the progress at each tenth, with the time left."""
        if line := self._tenths.line(name, done, total):
            self.on_message(line)


class LineObserver(AnnouncingObserver):
    """Prints one plain line for every message and epoch.

    Args:
        file: Where to print; by default standard error. A notebook shows `sys.stdout` without a red background.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__()
        self._file = file

    def on_message(self, text: str) -> None:
        """Print the message. A message that cannot be printed does not end the run."""
        # ValueError: the file is closed, or its encoding lacks a character.
        with contextlib.suppress(OSError, ValueError):
            print(text, file=self._file or sys.stderr, flush=True)

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int, noun: str = "image") -> None:
        """Print the name of the training, and the epoch after which it continues."""
        self._epochs, self._images, self._done = epochs, images, done
        self._start = time.perf_counter()
        self._noun = noun
        goes_on = f", continued after epoch {done}" if done else ""
        self.on_message(f"training {name}: {count(epochs, 'epoch')} of {count(images, noun)}{goes_on}")

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Print the epoch's line of history."""
        left = (self._epochs - epoch) * (time.perf_counter() - self._start) / (epoch - self._done)
        self.on_message(
            f"epoch {epoch}/{self._epochs}  loss {row['loss']:.4f}  train accuracy {row['train_accuracy']:.1f}%  "
            f"{self._images / row['seconds']:.0f} {self._noun}s/s  {left:.0f} s left"
        )
