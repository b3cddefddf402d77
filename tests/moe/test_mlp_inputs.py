"""Reading the inputs of MLPs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe.moe.mlp_inputs import mlp_inputs
from backdoorbench_moe.testing.expert_tasks import TinyMergeable


class OnMaps(nn.Module):
    """A model whose MLP is applied to maps (B, H, W, D): here, twice the images."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(3, 3)

    def forward(self, images):
        return self.mlp(2 * images.permute(0, 2, 3, 1)).mean((1, 2))

    def mlps(self):
        return {"mlp": self.mlp}

    def token_layout(self):
        return (2, 2), 0


def test_maps_are_flattened_row_by_row() -> None:
    model, images = OnMaps(), torch.arange(24.0).reshape(2, 3, 2, 2)
    with mlp_inputs(model) as inputs:
        model(images)
    [tokens] = inputs.values()
    assert tokens.shape == (2, 4, 3)
    # Pixel (1, 0) of the second image holds 14, 18 and 22.
    assert tokens[1, 2].tolist() == [28, 36, 44]


@pytest.mark.parametrize("prefix", [0, 2])
def test_one_tensor_a_layer_and_prefix_tokens_first(prefix) -> None:
    model, images = TinyMergeable(prefix=prefix), torch.rand(2, 3, 32, 32)
    with mlp_inputs(model) as inputs:
        model(images)
    assert list(inputs) == list(model.mlps())
    assert [tuple(tokens.shape) for tokens in inputs.values()] == [(2, prefix + 16, 8)] * 3
    assert not any(block.mlp._forward_pre_hooks for block in model.blocks)
    first = inputs["blocks.0.mlp"]
    alike = torch.cat([model.first, model.stem(images - 0.5).flatten(2).mT[:1]], dim=1)
    block = model.blocks[0]
    expected = block.norm(alike + block.mix(alike.mean(1, keepdim=True)))
    torch.testing.assert_close(first[:1], expected)
    (inputs["blocks.2.mlp"] ** 2).sum().backward()
    assert model.stem.weight.grad.any() and model.blocks[1].mlp.fc1.weight.grad.any()


def test_each_pass_fills_it_anew() -> None:
    model = TinyMergeable()
    with mlp_inputs(model) as inputs:
        model(torch.rand(2, 3, 32, 32))
        model(torch.rand(5, 3, 32, 32))
    assert {len(tokens) for tokens in inputs.values()} == {5} and len(inputs) == 3


def test_hooks_are_removed_after_an_error() -> None:
    model = TinyMergeable()
    with pytest.raises(RuntimeError), mlp_inputs(model):
        model(torch.rand(2, 5, 32, 32))
    assert not any(block.mlp._forward_pre_hooks for block in model.blocks)
