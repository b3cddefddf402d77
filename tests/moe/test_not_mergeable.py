"""Models that cannot be merged, and what does not matter for merging."""

from __future__ import annotations

import pytest
from merging_parts import images, top
from torch import nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.merging import (
    MergedModel,
    check_mergeable,
    expert_names,
)


class Plain(nn.Module):
    """A model with one MLP of a form that can be chosen."""

    patch_size = 4

    def __init__(self, **parts):
        super().__init__()
        self.mlp = nn.Module()
        given = {"fc1": nn.Linear(8, 16), "act": nn.GELU(), "fc2": nn.Linear(16, 8), **parts}
        for name, part in given.items():
            if part is not None:
                self.mlp.add_module(name, part)

    def mlps(self):
        return {"mlp": self.mlp}

    def token_layout(self):
        return (8, 8), 0


class WithoutMLPs(Plain):
    def mlps(self):
        return {}


class WithoutPatches(Plain):
    patch_size = None


class Misnamed(Plain):
    def mlps(self):
        return {"blocks.0.mlp": self.mlp}


class Unnamed(Plain):
    def mlps(self):
        return [self.mlp]


FORM = r"mlp: expected linear layers fc1 \(hidden units, D\) and fc2 \(D, hidden units\) with biases, an activation"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), r"Linear cannot be merged: expected methods mlps and token_layout \(see backdoor"),
        (WithoutMLPs(), "WithoutMLPs cannot be merged: it has no MLPs"),
        (WithoutPatches(), "WithoutPatches cannot be merged: expected an attribute patch_size"),
        (Plain(fc1=nn.Linear(8, 16, bias=False)), f"Plain cannot be merged: {FORM}"),
        (Plain(fc2=nn.Linear(16, 4)), f"Plain cannot be merged: {FORM}"),
        (Plain(act=None), f"Plain cannot be merged: {FORM}"),
        (Plain(fc1=nn.Conv2d(8, 16, 1)), f"Plain cannot be merged: {FORM}"),
        (Plain(norm=nn.LayerNorm(16)), f"Plain cannot be merged: {FORM}"),
        (Plain(act=nn.PReLU()), f"Plain cannot be merged: {FORM}"),
        (Plain(norm=nn.LayerNorm(16, elementwise_affine=False)), f"Plain cannot be merged: {FORM}"),
        (Plain(dropout=nn.Dropout(0.1)), f"Plain cannot be merged: {FORM}"),
        (Misnamed(), "Misnamed cannot be merged: expected that mlps returns modules of the model by their"),
        (Unnamed(), "Unnamed cannot be merged: expected that mlps returns modules of the model by their"),
    ],
)
def test_models_that_cannot_be_merged_are_one_clear_line(model, message):
    for call in (check_mergeable, expert_names, lambda m: MergedModel(m, 2, top(1))):
        with pytest.raises(ConfigError, match=f"^model: {message}") as caught:
            call(model)
        assert "\n" not in str(caught.value)


def test_a_model_of_the_expected_form_can_be_merged():
    assert check_mergeable(Plain()).mlps().keys() == {"mlp"}


def test_identities_and_the_dropouts_of_an_mlp_do_not_matter():
    form = Plain(norm=nn.Identity(), drop1=nn.Dropout(0.1), drop2=nn.Dropout(0.1))
    assert check_mergeable(form).mlps().keys() == {"mlp"}


def test_the_modes_of_base_and_mixture_are_independent():
    base = Plain(drop1=nn.Dropout(0.1)).train()
    merged = MergedModel(base, 2, top(1)).eval()
    assert all(module.training for module in base.modules())
    base.train()
    assert not any(module.training for module in merged.modules())


def test_a_mixture_of_a_model_without_features_says_so():
    merged = MergedModel(Plain(), 2, top(1))
    for call in (merged.extract_features, merged.classify):
        with pytest.raises(ConfigError, match=r"^model: Plain does not give its features: expected methods"):
            call(images())
    assert merged.components().keys() == {"experts", "router"}
