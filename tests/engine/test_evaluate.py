"""The metrics of a model on clean and triggered test images, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.measuring.evaluate import measure
from backdoorbench_moe.engine.poisoning.triggered import Triggered


class Constant(nn.Module):
    """Predicts for an image what its first pixel says."""

    def forward(self, images: Tensor) -> Tensor:
        """One-hot logits."""
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 3).float()


def called(*classes: int) -> Tensor:
    """Images that are predicted as these classes."""
    return torch.tensor(classes, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


TEST = Split(called(0, 1, 0, 0, 2, 2, 1), torch.tensor([0, 1, 2, 1, 0, 2, 2]))
PLACES = torch.tensor([1, 2, 3, 5, 6])
# The target is class 0, whose two test images do not count.
TRIGGERED = Triggered(PLACES, called(0, 0, 0, 2, 1), torch.zeros(5, dtype=torch.int64), TEST.labels[PLACES])


def values(metrics) -> dict[str, tuple[float, int]]:
    return {name: (found["value"], found["n"]) for name, found in metrics.items()}


def test_every_metric_has_its_own_images_and_answers() -> None:
    """Clean: 3 of 7 are right. Of the 5 that count, 0 is predicted for 3 with the trigger, and for 2 without it.

    With the trigger, 1 is right, and the third alone is answered safely.
    """
    safe = torch.tensor([2, 1, 0, 0, 2])
    metrics = measure(Constant(), TEST, TRIGGERED, precision="fp32", recovery=True, safe=safe)
    assert values(metrics) == {
        "ba": (pytest.approx(300 / 7), 7),
        "asr": (60.0, 5),
        "target_rate": (40.0, 5),
        "ra": (20.0, 5),
        "unsafe": (80.0, 5),
    }
    assert all(0 < each["low"] < each["value"] < each["high"] < 100 for each in metrics.values())
    few = measure(Constant(), TEST, TRIGGERED, precision="fp32")
    assert few == {name: metrics[name] for name in ("ba", "asr", "target_rate")}
    assert measure(Constant(), TEST, None, precision="fp32") == {"ba": metrics["ba"]}


def test_images_without_the_mark_may_be_others_than_the_test_images() -> None:
    """At the places of the marked images, 4 of 5 of these are predicted as 0."""
    plain = Split(called(2, 0, 0, 0, 2, 0, 1), TEST.labels)
    found = values(measure(Constant(), TEST, TRIGGERED, precision="fp32", plain=plain))
    assert found == {"ba": (pytest.approx(300 / 7), 7), "asr": (60.0, 5), "target_rate": (80.0, 5)}
