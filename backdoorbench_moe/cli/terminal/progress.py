"""Progress on stderr: a bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from backdoorbench_moe.engine.progress.lines import AnnouncingObserver, LineObserver
from backdoorbench_moe.engine.progress.observer import Observer


def make_observer(*, quiet: bool) -> Observer:
    """Return the observer that suits stderr."""
    if quiet:
        return Observer()
    return BarObserver() if sys.stderr.isatty() else LineObserver()


class BarObserver(AnnouncingObserver):
    """A bar with epoch, loss, images or texts per second and time left."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def on_message(self, text: str) -> None:
        """Print the message above the bar."""
        self._console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int, noun: str = "image") -> None:
        """Show a bar over all images of all epochs."""
        self.on_message(f"training {name}")
        columns = (
            "epoch {task.fields[epoch]}",
            "loss {task.fields[loss]}",
            f"{{task.fields[rate]:.0f}} {noun}s/s",
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
        """Show the number of the next epoch."""
        assert self._bar is not None
        shown = f"{min(epoch + 1, self._epochs)}/{self._epochs}"
        self._bar.update(self._task, epoch=shown, loss=f"{row['loss']:.3f}")

    def on_train_end(self) -> None:
        """Leave the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
