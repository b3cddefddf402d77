"""Observers, which receive the progress of a run. The engine itself prints nothing."""

from __future__ import annotations


class StopRun(Exception):
    """Raised by an observer to interrupt the run, which can be continued from its last finished epoch."""


class Observer:
    """Receives progress and ignores it. Subclasses override the methods that they need."""

    def on_message(self, text: str) -> None:
        """A line of text says what the run is doing."""

    def on_wait(self, folder: str) -> None:
        """Another process is making a run that this one needs; called twice a second until that is done."""

    def on_found(self, folder: str) -> None:
        """A run is finished in its folder already, and is not made: before this call, or while it waited."""

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int, noun: str = "image") -> None:
        """Training of `name` starts or continues: `done` of `epochs` are finished; each has `images` images.

        `noun` says what they are: "image" or "text".
        """

    def on_step(self, images: int, loss: float | None) -> None:
        """A batch of `images` images is finished; `loss` is the mean of the epoch so far, or None."""

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Epoch number `epoch`, from 1, is finished; `row` is its row of the history."""

    def on_train_end(self) -> None:
        """Training is finished or was interrupted."""
