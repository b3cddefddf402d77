"""Observers, which receive the progress of a run. The engine prints nothing itself."""

from __future__ import annotations


class StopRun(Exception):
    """Raised by an observer to interrupt the run, which can be continued after its last finished epoch."""


class Observer:
    """Receives progress and ignores it. Subclasses override the methods that they need."""

    def on_message(self, text: str) -> None:
        """Receive a line of text about the current step of the run."""

    def on_wait(self, folder: str) -> None:
        """Another process is working on a run that this one needs. Called twice a second while waiting."""

    def on_found(self, folder: str) -> None:
        """A run was already finished, or another process finished it while this one waited, and is reused."""

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int, noun: str = "image") -> None:
        """Training of `name` starts or continues. `done` of `epochs` are finished; each has `images` images.

        `noun` is "image", or "text" for texts.
        """

    def on_step(self, images: int, loss: float | None) -> None:
        """A batch of `images` images has finished. `loss` is the mean of the epoch so far, or None."""

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Epoch number `epoch`, from 1, has finished. `row` is its row of the history."""

    def on_train_end(self) -> None:
        """Training has finished or was interrupted."""

    def on_progress(self, name: str, done: int, total: int) -> None:
        """`done` of at most `total` steps of `name`, such as a defense, have finished outside of training."""
