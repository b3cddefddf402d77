"""Which of timm's architectures can be merged, and what is said about the others."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.merging import check_mergeable, mlp_inputs


@pytest.mark.parametrize(
    ("architecture", "options", "layout"),
    [
        ("test_vit", {}, ((8, 8), 1)),
        ("vit_tiny_patch16_224", {"depth": 2, "patch_size": 8}, ((4, 4), 1)),
        ("vit_base_patch16_siglip_224", {"depth": 2, "embed_dim": 24, "num_heads": 2}, ((8, 8), 0)),
        ("vit_medium_patch16_reg4_gap_256", {"depth": 2, "embed_dim": 24, "num_heads": 2}, ((8, 8), 4)),
        ("deit_tiny_distilled_patch16_224", {"image_size": 224}, ((14, 14), 2)),
    ],
)
@torch.no_grad()
def test_plain_vision_transformers_can_be_merged(architecture, options, layout):
    """With or without a class token, register tokens and a distillation token."""
    model = create_model(f"timm:{architecture}", **options).eval()
    assert check_mergeable(model).token_layout() == layout
    mlps = model.mlps()
    assert list(mlps) == [f"network.blocks.{number}.mlp" for number in range(len(model.network.blocks))]
    size = options.get("image_size", 32)
    with mlp_inputs(model) as inputs:
        model(torch.rand(2, 3, size, size))
    (rows, columns), prefix = layout
    assert list(inputs) == list(mlps)
    assert {tokens.shape[:2] for tokens in inputs.values()} == {(2, prefix + rows * columns)}


NO_MLPS = "it has no MLPs of two linear layers with biases and only an activation between them$"


@pytest.mark.parametrize(
    ("architecture", "size", "reason"),
    [
        ("test_resnet", 32, NO_MLPS),
        ("eva02_tiny_patch14_224", 56, NO_MLPS),
        (
            "test_convnext",
            32,
            "its MLPs are at several resolutions, and all of them must have the same patches$",
        ),
        ("swin_tiny_patch4_window7_224", 224, "its MLPs are at several resolutions"),
        (
            "vit_relpos_small_patch16_224",
            32,
            "it is not a plain vision transformer of timm, such as vit_",
        ),
        ("vit_tiny_r_s16_p8_224", 64, "its patches are computed by HybridEmbed, not by one convolution$"),
        ("vit_small_patch16_18x2_224", 32, "its block 0 is not plain, with an MLP of two linear layers"),
    ],
)
def test_others_are_refused_with_the_reason(architecture, size, reason):
    with torch.device("meta"):
        model = create_model(f"timm:{architecture}", image_size=size)
    for call in (model.mlps, model.token_layout, lambda: check_mergeable(model)):
        with pytest.raises(ConfigError, match=f"^model: timm's '{architecture}' cannot be merged: {reason}"):
            call()
