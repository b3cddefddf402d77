"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from backdoorbench_moe.counting import count
from backdoorbench_moe.engine.observer import Observer


def make_observer(*, quiet: bool) -> Observer:
    """The observer that suits stderr."""
    if quiet:
        return Observer()
    return BarObserver() if sys.stderr.isatty() else LineObserver()


class _Teller(Observer):
    """Says once which run is waited for."""

    _waited_for: str | None = None

    def on_found(self, folder: str) -> None:
        """Say so."""
        self.on_message(f"found finished: {folder}")

    def on_wait(self, folder: str) -> None:
        """Say so, the first time."""
        if self._waited_for != folder:
            self._waited_for = folder
            self.on_message(f"waiting for another process in {folder}")


class LineObserver(_Teller):
    """Prints one plain line for every message and epoch.

    Args:
        file: Where to print; by default standard error. A notebook shows `sys.stdout` without a red background.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def on_message(self, text: str) -> None:
        """Print the message; a run does not end because it cannot be printed."""
        with contextlib.suppress(OSError):
            print(text, file=self._file or sys.stderr, flush=True)

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int) -> None:
        """Print what is trained, and after which epoch it continues."""
        self._epochs, self._images, self._done = epochs, images, done
        self._start = time.perf_counter()
        goes_on = f", continued after epoch {done}" if done else ""
        self.on_message(f"training {name}: {count(epochs, 'epoch')} of {count(images, 'image')}{goes_on}")

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Print the epoch's line of history."""
        left = (self._epochs - epoch) * (time.perf_counter() - self._start) / (epoch - self._done)
        self.on_message(
            f"epoch {epoch}/{self._epochs}  loss {row['loss']:.4f}  train accuracy {row['train_accuracy']:.1f}%  "
            f"{self._images / row['seconds']:.0f} images/s  {left:.0f} s left"
        )


class BarObserver(_Teller):
    """A bar with epoch, loss, images/s and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def on_message(self, text: str) -> None:
        """Print the message above the bar."""
        self._console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int) -> None:
        """Show a bar over all images of all epochs."""
        self.on_message(f"training {name}")
        columns = (
            "epoch {task.fields[epoch]}",
            "loss {task.fields[loss]}",
            "{task.fields[rate]:.0f} images/s",
        )
        self._bar = Progress(
            BarColumn(),
            TaskProgressColumn(),
            *map(TextColumn, columns),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._epochs, self._seen, self._start = epochs, 0, time.perf_counter()
        self._task: TaskID = self._bar.add_task(
            "",
            total=epochs * images,
            completed=done * images,
            epoch=f"{done + 1}/{epochs}",
            loss="–",
            rate=0.0,
        )
        self._bar.start()

    def on_step(self, images: int, loss: float | None) -> None:
        """Move the bar."""
        assert self._bar is not None
        self._seen += images
        shown: dict[str, Any] = {} if loss is None else {"loss": f"{loss:.3f}"}
        rate = self._seen / (time.perf_counter() - self._start)
        self._bar.update(self._task, advance=images, rate=rate, **shown)

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Name the next epoch."""
        assert self._bar is not None
        shown = f"{min(epoch + 1, self._epochs)}/{self._epochs}"
        self._bar.update(self._task, epoch=shown, loss=f"{row['loss']:.3f}")

    def on_train_end(self) -> None:
        """Leave the bar on the screen as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
