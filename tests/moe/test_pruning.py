"""Activity of channels, ranking them and keeping them at zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe.moe.pruning import channel_means, kept_silent, lowest, silence


def test_lowest_takes_the_first_of_equals() -> None:
    assert lowest(torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0]), 2).tolist() == [1, 3]
    assert lowest(torch.tensor([-1.0, -5.0, 0.0]), 1).tolist() == [1]
    assert lowest(torch.tensor([1.0]), 0).tolist() == []


def test_means_by_hand() -> None:
    """Two batches of unequal size, one channel negated: the mean is over values, not over batches."""
    conv = nn.Conv2d(1, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
    first = torch.tensor([[[[4.0, -2.0]]]])  # values 4, -2
    second = torch.tensor([[[[1.0, 0.0]]], [[[-6.0, 3.0]]]])  # values 1, 0, -6, 3

    def run() -> None:
        with torch.inference_mode():
            conv(first)
            conv(second)

    signed = channel_means([conv], run, rectify=False)[conv]
    assert signed.tolist() == pytest.approx([0 / 6, 0 / 6])
    rectified = channel_means([conv, conv], run, rectify=True)[conv]
    assert rectified.dtype == torch.float64
    assert rectified.tolist() == pytest.approx([8 / 6, 8 / 6])  # 4 + 1 + 3, and 2 + 6
    assert not conv._forward_hooks


def test_the_channels_of_a_linear_layer_are_the_last_dimension() -> None:
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        linear.bias.copy_(torch.tensor([0.0, 1.0]))
    values = torch.tensor([[[4.0], [-2.0], [0.0]]])  # and 4, -2, 0 and -3, 3, 1 come out
    means = channel_means([linear], lambda: linear(values), rectify=True)[linear]
    assert means.tolist() == pytest.approx([4 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv1d(2, 3, 1), (4, 2, 5)), (nn.Conv3d(2, 3, 1), (4, 2, 5, 6, 7))]
)
def test_the_channels_of_a_convolution_are_dimension_1(module, shape) -> None:
    values = torch.randn(shape)
    means = channel_means([module], lambda: module(values), rectify=False)[module]
    expected = module(values).detach().double().transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-6)


def test_frozen_channels_need_no_care() -> None:
    conv = nn.Conv2d(2, 4, 3)
    conv.weight.requires_grad_(False)
    silence(conv, torch.tensor([1]))
    with kept_silent([(conv, torch.tensor([1]))]):
        conv(torch.rand(1, 2, 4, 4)).sum().backward()
    assert conv.weight.grad is None and conv.bias.grad[1] == 0 and (conv.bias.grad[[0, 2, 3]] != 0).all()


def test_a_module_that_is_not_called_is_an_error() -> None:
    conv = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="to call every module"):
        channel_means([conv], lambda: None, rectify=True)
    assert not conv._forward_hooks


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0.1, fused=True),
    ],
    ids=["sgd", "adamw"],
)
def test_silent_channels_stay_exactly_zero_and_no_others(make) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.bias.add_(0.5)
    pruned = [(conv, torch.tensor([1, 3])), (norm, torch.tensor([3]))]
    for module, channels in pruned:
        silence(module, channels)
    before = {name: p.detach().clone() for name, p in conv.named_parameters()}
    optimizer = make([*conv.parameters(), *norm.parameters()])
    images = torch.rand(5, 2, 8, 8)

    def step() -> None:
        optimizer.zero_grad()
        (norm(conv(images)) - 1).pow(2).sum().backward()
        optimizer.step()

    with kept_silent(pruned):
        for _ in range(4):
            step()
    for parameter in (conv.weight, conv.bias):
        assert (parameter[[1, 3]] == 0).all()
    assert (conv.weight[[0, 2]] != before["weight"][[0, 2]]).all()
    assert norm.bias[3] == 0 and norm.weight[3] == 0 and norm.bias[1] != 0.5
    step()
    assert norm.bias[3] != 0, "free again once the block is over"
