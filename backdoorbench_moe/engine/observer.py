"""How a run tells what it is doing. The engine prints nothing itself."""

from __future__ import annotations


class StopRun(Exception):
    """Raised by an observer: stop here; the run is interrupted and goes on from its last finished epoch."""


class Observer:
    """Receives progress; this one ignores it. Subclass and override what is of interest."""

    def on_message(self, text: str) -> None:
        """One line about what happens now."""

    def on_wait(self, folder: str) -> None:
        """Another process works in a run folder that this run needs; called twice a second until it is done."""

    def on_found(self, folder: str) -> None:
        """A run is finished in its folder already, and is not made: before this call, or while it waited."""

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int) -> None:
        """Training of run `name` starts or goes on: `done` of `epochs` are behind it, `images` in each."""

    def on_step(self, images: int, loss: float | None) -> None:
        """A batch of `images` is done; `loss` is the epoch's mean so far, now and then."""

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Epoch number `epoch` (from 1) is done; `row` is its line in the history."""

    def on_train_end(self) -> None:
        """Training is over, or was interrupted."""
