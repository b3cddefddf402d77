"""What tests of runs share: an observer that counts and interrupts, and what two equal runs have in common."""

from __future__ import annotations

from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import Run


def outcome(run: Run) -> tuple[object, ...]:
    """What must be equal, bit for bit, between two ways to the same run."""
    tensors, _ = run.folder.load_tensors()
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in run.record.history]
    return run.record.metrics, history, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


class Counting(Observer):
    """Counts epochs; interrupts after a given one, as Ctrl-C would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.epochs, self.messages, self.stop_after = 0, [], stop_after

    def on_message(self, text: str) -> None:
        self.messages.append(text)

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        self.epochs += 1
        if self.epochs == self.stop_after:
            raise KeyboardInterrupt
