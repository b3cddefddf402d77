"""Predictions from logits, and the mode and the precision that models are asked in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.inference import features, logits, losses, predict, routings
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing


def test_a_model_whose_logits_are_not_numbers_predicts_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    assert predict(model, images, precision="fp32").tolist() == [2] * 5
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    with pytest.raises(RecordError, match="logits contain NaN"):
        predict(model, images, precision="fp32")


class Moody(RoutedModel):
    """A head on the mean colours, which is wrong in training mode and keeps the dtype that it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.dtypes = nn.Linear(3, 3), []
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def extract_features(self, images: torch.Tensor) -> torch.Tensor:
        found = self.head(images.mean((2, 3)))
        self.dtypes.append(found.dtype)
        return -found if self.training else found

    def forward_routed(self, images: torch.Tensor) -> RoutedOutput:
        found = self.extract_features(images)
        return RoutedOutput(found, [Routing("a", found.unsqueeze(2), found.unsqueeze(2) > 0)])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_model_in_training_is_asked_in_evaluation_mode_in_the_given_precision(precision, dtype) -> None:
    """The colours are 1, 0, 0 and 0, 0, 1, so that both precisions are exact."""
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    images[0, 0], images[1, 2] = 255, 255
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    wrong = torch.logsumexp(colours[0], 0).item()
    calls = {
        logits: (images, colours),
        features: (images, colours),
        predict: (images, torch.tensor([0, 2])),
        losses: (Split(images, torch.tensor([0, 1])), torch.tensor([wrong - 1, wrong])),
    }
    for call, (given, expected) in calls.items():
        model = Moody().train()
        torch.testing.assert_close(call(model, given, precision=precision), expected, msg=call.__name__)
        assert model.dtypes == [dtype] and not model.training, call.__name__
    model = Moody().train()
    [[routing]] = routings(model, images, precision=precision)
    torch.testing.assert_close(routing.gates.squeeze(2).float(), colours)
    assert model.dtypes == [dtype] and not model.training
