"""Predictions from logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.errors import RecordError


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
