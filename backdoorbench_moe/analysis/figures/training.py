"""Over training: loss and accuracy, and what the probe images' routing was after every epoch."""

from __future__ import annotations

from collections.abc import Iterator

from backdoorbench_moe.analysis.figures.charts import Panel, Series, chart
from backdoorbench_moe.analysis.figures.plate import Doc, Plate, make_plate
from backdoorbench_moe.analysis.figures.words import count


def draw_history(facts: Doc) -> Iterator[Plate]:
    """Loss and training accuracy of every epoch of a run."""
    if history := facts["record"]["history"]:
        yield _history(history, ", poisoned ones among them," if facts["record"]["poison"] else "")


def _history(history: list[Doc], poisoned: str) -> Plate:
    epochs = [row["epoch"] for row in history]
    panels = [
        Panel("loss", [Series("run", [row["loss"] for row in history], style="line")], x=epochs),
        Panel(
            "training accuracy, %",
            [Series("run", [row["train_accuracy"] for row in history], style="line")],
            x=epochs,
        ),
    ]
    first, last = history[0], history[-1]
    said = (
        f"{count(len(history), 'epoch')}: the loss goes from {first['loss']:.3f} to {last['loss']:.3f}, the "
        f"accuracy on the training images{poisoned} from {first['train_accuracy']:.1f}% to "
        f"{last['train_accuracy']:.1f}%."
    )
    return make_plate(
        "history",
        "Training",
        said,
        f"Two lines over the epochs. {said}",
        lambda: chart(panels, xlabel="epoch", ylabel="", share_y=False, limits=(None, None), height=1.4),
    )
