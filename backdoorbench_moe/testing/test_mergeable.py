"""Conformance tests of models whose MLPs can become the experts of a mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.layers import Router, TopKRouter
from backdoorbench_moe.moe.merging import MergedModel, check_mergeable, expert_of, load_experts, mlp_inputs
from backdoorbench_moe.moe.structure import Mergeable, WithFeatures
from backdoorbench_moe.testing.making import batch, changed, copies, used_model

only_mergeable = pytest.mark.only(interface=Mergeable)


def images() -> Tensor:
    return batch(4, 3, 32, 32)


def every_expert(features: int, num_experts: int) -> Router:
    """A router that sends each token to all experts, with weights that sum to 1."""
    return TopKRouter(features, num_experts, top_k=num_experts, gate_std=1.0)


def mergeable(name: str, *, seed: int = 0) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return a model and its MLPs. A model may wrap an architecture that cannot be merged."""
    model = used_model(name, seed=seed)
    assert isinstance(model, Mergeable)
    try:
        model.mlps()
    except ConfigError as refusal:
        pytest.skip(str(refusal))
    return model, check_mergeable(model).mlps()


@only_mergeable
@torch.no_grad()
def test_all_mlps_are_given_the_tokens_of_the_layout(model_name: str) -> None:
    """First the tokens before the patches, then the patches. The MLPs are computed in the order of their names."""
    model, mlps = mergeable(model_name)
    assert all(model.get_submodule(name) is mlp for name, mlp in mlps.items())
    (rows, columns), prefix = check_mergeable(model).token_layout()
    side = model.patch_size
    assert (rows * side, columns * side) == (32, 32) and prefix >= 0
    with mlp_inputs(model) as inputs:
        model(images())
    assert list(inputs) == list(mlps)
    for name, mlp in mlps.items():
        assert inputs[name].shape == (4, prefix + rows * columns, mlp.get_submodule("fc1").in_features)


@only_mergeable
@torch.no_grad()
def test_an_mlp_is_an_activation_between_two_linear_layers(model_name: str) -> None:
    for name, mlp in mergeable(model_name)[1].items():
        fc1, act, fc2 = (mlp.get_submodule(part) for part in ("fc1", "act", "fc2"))
        tokens = batch(4, 5, fc1.in_features)
        torch.testing.assert_close(mlp(tokens), fc2(act(fc1(tokens))), msg=name)


@only_mergeable
@torch.no_grad()
def test_a_mixture_of_copies_is_the_model_itself(model_name: str) -> None:
    model, _ = mergeable(model_name)
    merged = MergedModel(model, 3, every_expert)
    torch.testing.assert_close(merged(images()), model(images()), rtol=1e-4, atol=1e-5)
    if isinstance(model, WithFeatures):
        features = merged.extract_features(images())
        torch.testing.assert_close(features, model.extract_features(images()), rtol=1e-4, atol=1e-5)
        assert torch.equal(merged.classify(features), merged(images()))


@only_mergeable
@torch.no_grad()
def test_an_expert_can_be_merged_and_taken_out_again(model_name: str) -> None:
    """Only the MLPs belong to an expert; the rest of the model is that of the base."""
    model, mlps = mergeable(model_name)
    base, expert = copies(model), copies(model)
    for name in mlps:
        for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            expert[f"{name}.{part}"] += 0.1 * batch(*expert[f"{name}.{part}"].shape)
    merged = MergedModel(mergeable(model_name, seed=1)[0], 2, every_expert)
    load_experts(merged, base, [base, expert])
    for number, want in enumerate((base, expert)):
        found = expert_of(merged, number)
        assert found.keys() == want.keys() and not changed(want, found)
    alone = MergedModel(model, 1, every_expert)
    load_experts(alone, base, [expert])
    model.load_state_dict(expert)
    torch.testing.assert_close(alone(images()), model(images()), rtol=1e-4, atol=1e-5)
