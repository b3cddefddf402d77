"""Which norm follows which convolution, for every kind of network that there is, written down by hand."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import used_model
from torch import nn

from backdoorbench_moe.moe.pairing import convolutions_before

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# Blocks of a wide residual network: the first norm takes what is before the block, the second its first convolution.
TRUNK = {
    "trunk.block1.norm1": {"trunk.stem"},
    "trunk.block1.norm2": {"trunk.block1.conv1"},
    "trunk.block2.norm1": {"trunk.block1.conv2", "trunk.block1.shortcut"},
    "trunk.block2.norm2": {"trunk.block2.conv1"},
}
EXPECTED = {
    # The experts' own norm takes gated cells, which are products and no output of a convolution.
    "pmoe": {
        **TRUNK,
        "reduce_norm": {"trunk.block2.conv2", "trunk.block2.shortcut"},
        "norm": {"moe.conv"},
    },
    "wide_resnet": {
        **TRUNK,
        "block3.norm1": {"trunk.block2.conv2", "trunk.block2.shortcut"},
        "block3.norm2": {"block3.conv1"},
        "norm": {"block3.conv2", "block3.shortcut"},
    },
}


def pairs(model: nn.Module) -> dict[str, set[str]]:
    return {norm: set(convs) for norm, convs in convolutions_before(model, IMAGES).items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_pairs_by_hand(name) -> None:
    assert pairs(used_model(name)) == EXPECTED[name]


def test_pre_activation_with_identities() -> None:
    """Behind an identity only the block's own convolution counts, behind a shortcut both."""
    found = pairs(used_model("preact_resnet18"))
    assert found["blocks.0.norm1"] == {"stem"}
    assert found["blocks.1.norm1"] == {"blocks.0.conv2"}
    assert found["blocks.3.norm1"] == {"blocks.2.conv2", "blocks.2.shortcut"}
    assert found["norm"] == {"blocks.7.conv2"}
    assert all(found[f"blocks.{n}.norm2"] == {f"blocks.{n}.conv1"} for n in range(8))
    assert len(found) == 17


def test_every_norm_of_post_activation_follows_one_convolution() -> None:
    vgg = used_model("vgg16_bn")
    found = pairs(vgg)
    assert len(found) == 13
    for norm, convs in found.items():
        *path, number = norm.split(".")
        assert convs == {".".join([*path, str(int(number) - 1)])}
    resnet = used_model("timm:test_resnet")
    found = pairs(resnet)
    norms = [name for name, module in resnet.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(found) == set(norms) and all(len(convs) == 1 for convs in found.values())
    for norm, [conv] in found.items():
        shape = resnet.get_submodule(conv).weight.shape[0]
        assert shape == resnet.get_submodule(norm).num_features
        assert ("downsample" in norm) == ("downsample" in conv)


def test_the_order_of_computation_decides_not_that_of_modules() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_of_second = nn.BatchNorm2d(4)
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)
            self.norm_of_first = nn.BatchNorm2d(4)
            self.unused = nn.BatchNorm2d(4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.norm_of_second(self.second(self.norm_of_first(self.first(images)).relu()))

    model = Crossed().eval().requires_grad_(False)
    assert pairs(model) == {"norm_of_first": {"first"}, "norm_of_second": {"second"}}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layer_norms_have_no_pairs() -> None:
    assert pairs(used_model("convnext")) == {}
