"""Keras's "same" padding, by hand and by its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.models.wrn_blocks import SameConv2d, WideBlock


def test_odd_padding_goes_to_the_bottom_and_right():
    """A kernel of ones at stride 2 over a 4x4 map of ones counts the cells it covers."""
    conv = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    assert conv(torch.ones(1, 1, 4, 4)).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]
    # Of an odd side one row is missing on each side.
    assert conv(torch.ones(1, 1, 3, 3)).tolist() == [[[[4.0, 4.0], [4.0, 4.0]]]]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 8), (5, 9), (1, 2)])
def test_every_output_is_the_window_that_keras_takes(kernel, stride, height, width):
    conv = SameConv2d(2, 3, kernel, stride=stride)
    maps = torch.randn(1, 2, height, width)
    outputs = conv(maps)
    assert outputs.shape[2:] == (-(-height // stride), -(-width // stride))
    # The windows start at -floor(padding / 2); cut them out of a generously padded map one by one.
    starts = [
        -(max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2) + 5 for size in (height, width)
    ]
    wide = F.pad(maps, (5, 5, 5, 5))
    for row in range(outputs.shape[2]):
        for column in range(outputs.shape[3]):
            top, left = starts[0] + row * stride, starts[1] + column * stride
            window = wide[0, :, top : top + kernel, left : left + kernel]
            want = (conv.weight * window).sum((1, 2, 3)) + conv.bias
            torch.testing.assert_close(outputs[0, :, row, column], want, rtol=1e-4, atol=1e-5)


def test_block_of_zero_convolutions_is_its_shortcut():
    block = WideBlock(4, 6, stride=2)
    torch.nn.init.zeros_(block.conv2.weight)
    maps = torch.randn(2, 4, 8, 8)
    want = F.conv2d(maps[:, :, ::2, ::2], block.shortcut.weight)
    torch.testing.assert_close(block(maps), want)


def test_bn_momentum_reaches_every_norm_and_is_kerass_by_default() -> None:
    for name in ("pmoe", "wide_resnet"):
        for options, momentum in (({}, 0.01), ({"bn_momentum": 0.25}, 0.25)):
            model = create_model(name, widen_factor=1, **options)
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            assert norms and {norm.momentum for norm in norms} == {momentum}
    with pytest.raises(ConfigError, match="bn_momentum"):
        create_model("pmoe", bn_momentum=0.0)
