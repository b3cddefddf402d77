"""Reading the inputs of the MLPs of dense and merged models."""

from __future__ import annotations

import pytest
import torch
from merging_parts import DENSE, make_dense, make_merged

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.merging import MergedModel, mlp_inputs


def images(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def convnext_inputs(model, given):
    """By hand: what the MLPs of two ConvNeXt blocks are given, (B, rows * columns, D) each."""
    found, maps = [], model.stem(given)
    for block in model.blocks:
        tokens = block.norm(block.conv_dw(maps).permute(0, 2, 3, 1))
        found.append(tokens.reshape(len(given), -1, tokens.shape[-1]))
        maps = maps + (block.gamma * block.mlp(tokens)).permute(0, 3, 1, 2)
    return found


def vit_inputs(model, given):
    """By hand: what the MLPs of a transformer's blocks are given, the class token first."""
    network = model.network
    tokens = network.patch_embed(given)
    tokens = torch.cat([network.cls_token.expand(len(given), 1, -1), tokens], 1) + network.pos_embed
    found = []
    for block in network.blocks:
        tokens = tokens + block.attn(block.norm1(tokens))
        found.append(block.norm2(tokens))
        tokens = tokens + block.mlp(found[-1])
    return found


BY_HAND = dict(zip(DENSE, (convnext_inputs, vit_inputs), strict=True))


@pytest.mark.parametrize("name", DENSE)
def test_they_are_those_worked_out_by_hand(name):
    model = make_dense(name)
    with mlp_inputs(model) as inputs:
        model(images())
    assert list(inputs) == list(model.mlps())
    for got, want in zip(inputs.values(), BY_HAND[name](model, images()), strict=True):
        assert got.shape == (4, 64 + (name != "convnext"), 16)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_a_mixture_of_one_expert_has_the_inputs_of_the_expert(name):
    merged, base, [state] = make_merged(name, experts=1)
    base.load_state_dict(state)
    with mlp_inputs(merged) as inputs, mlp_inputs(base) as wanted:
        merged(images())
        base(images())
    assert list(inputs) == [f"network.{mlp}" for mlp in wanted] == [layer.name for layer in merged.layers()]
    for got, want in zip(inputs.values(), wanted.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_the_patches_are_numbered_row_by_row():
    """A change of the last pixel of an image reaches only the last patch of the first layer: the one at (7, 7)."""
    model, given = make_dense(kernel_size=1), images()
    other = given.clone()
    other[:, :, -1, -1] += 1
    with mlp_inputs(model) as inputs:
        model(given)
        first = inputs["blocks.0.mlp"]
        model(other)
    differs = (inputs["blocks.0.mlp"] != first).any(-1)
    assert differs[:, 63].all() and not differs[:, :63].any()
    corner = given.clone()
    corner[:, :, 0, -1] += 1
    with mlp_inputs(model) as inputs:
        model(corner)
    differs = (inputs["blocks.0.mlp"] != first).any(-1)
    assert differs[:, 7].all() and differs.sum() == 4


def test_gradients_pass_through():
    model = make_dense()
    with mlp_inputs(model) as inputs:
        model(images())
    inputs["blocks.1.mlp"].sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad.any() and model.blocks[1].mlp.fc1.weight.grad is None


@torch.no_grad()
def test_each_pass_fills_them_anew_until_the_block_ends():
    model = make_dense()
    with pytest.raises(KeyError), mlp_inputs(model) as inputs:
        model(images(2))
        assert len(inputs["blocks.0.mlp"]) == 2
        model(images(3))
        assert len(inputs["blocks.0.mlp"]) == 3 and not inputs["blocks.0.mlp"].requires_grad
        raise KeyError
    model(images(1))
    assert len(inputs["blocks.0.mlp"]) == 3
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_can_be_chosen():
    merged, base, _ = make_merged()
    for model, name in ((base, "blocks.1.mlp"), (merged, "network.blocks.1.mlp")):
        with mlp_inputs(model, [name]) as inputs:
            model(images())
        assert list(inputs) == [name]
        with (
            pytest.raises(UnknownNameError, match=rf"^mlp: unknown 'blocks\.7'; .*known: .*{name}"),
            mlp_inputs(model, ["blocks.7"]),
        ):
            pass


def test_other_models_are_refused():
    model = create_model("wide_resnet", widen_factor=1)
    with pytest.raises(ConfigError, match=r"^model: WideResNet cannot be merged"), mlp_inputs(model):
        pass
    assert not isinstance(model, MergedModel)
