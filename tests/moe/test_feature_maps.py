"""Which feature maps are found in a model, and that they are what the modules put out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.feature_maps import (
    collect_feature_maps,
    find_feature_maps,
    list_feature_maps,
    named_feature_maps,
)
from backdoorbench_moe.testing.making import batch, build_model
from backdoorbench_moe.testing.mixtures import build_mixture

FOUND = {
    "pmoe": {"trunk.block1": 32 * 32, "trunk": 16 * 16, "moe.conv": 8 * 8},
    "wide_resnet": {"trunk.block1": 32 * 32, "trunk": 16 * 16, "block3": 8 * 8},
    "preact_resnet18": {"blocks.3": 16 * 16, "blocks.5": 8 * 8, "blocks": 4 * 4},
    # The ReLUs before a max pooling. The last map has one position, which is none to attend to.
    "vgg16_bn": {"features.22": 8 * 8, "features.32": 4 * 4, "features.42": 2 * 2},
    "convnext": {"blocks.0": 8 * 8, "blocks.1": 8 * 8},
    "timm:test_vit": {f"network.blocks.{block}": 65 for block in (1, 3, 5)},
    "timm:test_resnet": {"network.layer2": 256, "network.layer3": 64, "network.layer4": 16},
    # A transformer with channels last, whose MLPs get tokens.
    "timm:swin_tiny_patch4_window7_224": {
        "network.patch_embed": 64,
        "network.layers.1": 16,
        "network.layers.2": 4,
    },
}
IMAGES = batch(2, 3, 32, 32)


@pytest.mark.parametrize("name", FOUND)
def test_the_last_block_at_each_resolution_or_blocks_in_equal_distances(name) -> None:
    model = build_model(name, num_classes=3).eval()
    found = find_feature_maps(model, IMAGES, count=3)
    assert {each.name: each.positions for each in found} == FOUND[name]
    with torch.no_grad(), collect_feature_maps(model, found) as features:
        model(IMAGES)
    assert [each.shape[2] for each in features] == [each.positions for each in found]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_mixture_and_what_lies_before_its_experts() -> None:
    mixture = build_mixture()
    names = [each.name for each in find_feature_maps(mixture, IMAGES, count=3)]
    assert names == ["network.blocks.0", "network.blocks.1"]
    before = find_feature_maps(mixture, IMAGES, count=3, before_experts=True)
    assert [each.name for each in before] == ["network.stem.1", "network.stem"]
    inside = ("router", "experts", "tap")
    assert not any(name in each.name for each in list_feature_maps(mixture, IMAGES) for name in inside)


def test_before_the_experts_of_pmoe_is_what_they_select_from() -> None:
    model = build_model("pmoe").eval()
    found = find_feature_maps(model, IMAGES, count=3, before_experts=True)
    assert [each.name for each in found] == ["trunk.block1", "trunk", "reduce"]


class Maps(nn.Module):
    """Modules with outputs of many forms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 1), nn.Unflatten(1, (8, 8, 1))
        self.twice, self.flat = nn.Hardtanh(), nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 8, 8) to (B, 320)."""
        features = self.twice(self.twice(self.first(images)))
        self.last(self.flat(features[:, :1]))
        return self.flat(features)


def test_channels_come_before_the_positions_whatever_the_memory_format() -> None:
    model, images = Maps().eval(), batch(3, 3, 8, 8)
    maps = named_feature_maps(model, images, ["last", "first"])
    with collect_feature_maps(model, maps) as features, torch.no_grad():
        model(images)
    last, first = features
    torch.testing.assert_close(first, model.first(images).detach().flatten(2))
    torch.testing.assert_close(last, first[:, :1].clamp(-1, 1))


def test_what_is_no_map_is_refused_by_name() -> None:
    model, images = Maps().eval(), batch(3, 3, 8, 8)
    for name in ("flat", "twice"):
        with pytest.raises(ConfigError, match=f"layers: the output of '{name}' is not a feature map"):
            named_feature_maps(model, images, [name])
    with pytest.raises(UnknownNameError, match="layers: unknown 'frist'; did you mean 'first'"):
        named_feature_maps(model, images, ["frist"])
    with pytest.raises(ConfigError, match="model: expected feature maps, Sequential has none"):
        find_feature_maps(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images, count=3)
