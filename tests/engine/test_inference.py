"""Outputs of models for images: in evaluation mode, in batches and in a precision; predictions from logits."""

from __future__ import annotations

import copy

import pytest
import torch
from defense_tasks import used_model
from torch import Tensor, nn

from backdoorbench_moe.engine.inference import features, logits, losses, predict, routings
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.ops.images import Split


class Noisy(nn.Module):
    """Its features and logits differ between the modes: a norm and a dropout before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3)
        with torch.no_grad():
            self.norm.running_mean.fill_(0.25)
            self.norm.running_var.fill_(4.0)

    def extract_features(self, images: Tensor) -> Tensor:
        """(B, 12)."""
        return self.drop(self.norm(images.flatten(1)))

    def classify(self, features: Tensor) -> Tensor:
        """(B, 3)."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3) logits."""
        return self.classify(self.extract_features(images))


IMAGES = torch.randint(0, 256, (7, 3, 2, 2), generator=torch.Generator().manual_seed(1)).byte()


def test_outputs_are_those_of_the_evaluation_mode_whatever_the_batches() -> None:
    """Features by hand: (x / 255 - 0.25) / sqrt(4 + eps). The norm's statistics do not change."""
    model = Noisy()
    before = copy.deepcopy(model.state_dict())
    expected = (IMAGES.flatten(1).float() / 255 - 0.25) / (4 + model.norm.eps) ** 0.5
    head = expected @ model.head.weight.detach().T + model.head.bias.detach()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    chances = head.exp() / head.exp().sum(1, keepdim=True)
    by_hand = -chances[torch.arange(7), labels].log()
    for run, values in (
        (lambda: features(model, IMAGES, precision="fp32"), expected),
        (lambda: logits(model, IMAGES, precision="fp32", batch_size=3), head),
        (lambda: losses(model, Split(IMAGES, labels), precision="fp32", batch_size=1), by_hand),
    ):
        torch.testing.assert_close(run(), values)
        model.train()
        torch.testing.assert_close(run(), values)
        assert not model.training
        model.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert logits(model, IMAGES, precision="bf16").dtype == torch.float32


def test_routing_is_that_of_the_evaluation_mode_batch_by_batch() -> None:
    model = used_model()
    images = torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    with torch.no_grad():
        [whole] = model.forward_routed(images.float() / 255).routing
    before = copy.deepcopy(model.state_dict())
    found = [layer for [layer] in routings(model.train(), images, precision="fp32", batch_size=3)]
    assert [len(each.gates) for each in found] == [3, 3, 1]
    torch.testing.assert_close(torch.cat([each.gates for each in found]), whole.gates)
    assert torch.equal(torch.cat([each.selected for each in found]), whole.selected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


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

    def extract_features(self, images: Tensor) -> Tensor:
        found = self.head(images.mean((2, 3)))
        self.dtypes.append(found.dtype)
        return -found if self.training else found

    def forward_routed(self, images: Tensor) -> RoutedOutput:
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
