"""Every conformance test of merging passes for a right model and fails for one that is wrong in what it tests."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from wrong_models import names_of, run

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.convnext import ConvNeXt
from backdoorbench_moe.testing import test_mergeable


class Right(ConvNeXt):
    """A small network, which passes them all."""

    def __init__(self) -> None:
        super().__init__(num_classes=3, features=16, depth=2)


class Shuffled(Right):
    def mlps(self) -> dict[str, nn.Module]:
        return dict(reversed(super().mlps().items()))


class MisnamedMLPs(Right):
    def mlps(self) -> dict[str, nn.Module]:
        first, second = super().mlps().values()
        return {"blocks.1.mlp": first, "blocks.0.mlp": second}


class OtherLayout(Right):
    def token_layout(self) -> tuple[tuple[int, int], int]:
        return (8, 8), 1


class OtherPatchSize(Right):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size = 8


class Doubled(nn.Module):
    """Its output is twice that of the two linear layers."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (mlp.get_submodule(name) for name in ("fc1", "act", "fc2"))

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * self.fc2(self.act(self.fc1(tokens)))


class OtherMLP(Right):
    def __init__(self) -> None:
        super().__init__()
        for name, mlp in super().mlps().items():
            self.set_submodule(name, Doubled(mlp))


class TiedWeights(Right):
    """An MLP's weights are also another part's, so that they are not an expert's own."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = next(iter(super().mlps().values())).get_submodule("fc1")


WRONG: list[tuple[type[Right], str]] = [
    (Shuffled, "all_mlps_are_given_the_tokens_of_the_layout"),
    (MisnamedMLPs, "all_mlps_are_given_the_tokens_of_the_layout"),
    (OtherLayout, "all_mlps_are_given_the_tokens_of_the_layout"),
    (OtherPatchSize, "all_mlps_are_given_the_tokens_of_the_layout"),
    (OtherMLP, "an_mlp_is_an_activation_between_two_linear_layers"),
    (OtherMLP, "a_mixture_of_copies_is_the_model_itself"),
    (TiedWeights, "an_expert_can_be_merged_and_taken_out_again"),
]


@pytest.mark.parametrize("name", names_of(test_mergeable))
def test_the_right_model_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(test_mergeable, name, Right, monkeypatch)


@pytest.mark.parametrize(("kind", "name"), WRONG, ids=lambda value: getattr(value, "__name__", "fails"))
def test_a_wrong_model_fails(kind: type[Right], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Names of other modules are refused before the assertions.
    with pytest.raises(ConfigError if kind is MisnamedMLPs else AssertionError):
        run(test_mergeable, name, kind, monkeypatch)


def test_no_conformance_test_is_without_a_wrong_model() -> None:
    assert {name for _, name in WRONG} == {*names_of(test_mergeable)}
