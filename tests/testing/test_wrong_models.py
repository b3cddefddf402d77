"""Every conformance test of structure passes for a right model and fails for one that is wrong in what it tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wrong_models import names_of, run

from backdoorbench_moe.models.pmoe import PMoE
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.moe.structure import ChannelGroup, Expert
from backdoorbench_moe.testing import test_structure


class Right(PMoE):
    """A small pMoE, which passes them all."""

    def __init__(self) -> None:
        options: dict[str, Any] = {**PMoE.tiny, "num_classes": 3}
        super().__init__(**options)

    def changed(self, **values: Callable[[Expert], object]) -> list[Expert]:
        """The experts, each with some values changed."""
        return [replace(e, **{key: f(e) for key, f in values.items()}) for e in super().experts()]


class HeadWithoutEffect(Right):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)

    def components(self) -> dict[str, list[nn.Module]]:
        return {**super().components(), "head": [self.unused]}


class OverlappingComponents(Right):
    def components(self) -> dict[str, list[nn.Module]]:
        return {**super().components(), "router": [self.moe]}


class GroupBeyondTheLayer(Right):
    def prunable(self) -> dict[str, list[ChannelGroup]]:
        return {"trunk": [ChannelGroup("trunk", self.reduce, 0, self.reduce.out_channels + 1)]}


class TapOfAnotherLayer(Right):
    def prunable(self) -> dict[str, list[ChannelGroup]]:
        size = self.reduce.out_channels
        return {"trunk": [ChannelGroup("trunk", self.reduce, 0, size, tap=self.reduce_norm)]}


class GroupWithoutEffect(Right):
    """The layer runs, but its output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Conv2d(3, 4, 1)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        self.aside(images)
        return super().forward_routed(images)

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        return {"trunk": [ChannelGroup.whole("trunk", self.aside)]}


class TooFewExperts(Right):
    def experts(self) -> list[Expert]:
        return super().experts()[:-1]


class SharedRows(Right):
    def experts(self) -> list[Expert]:
        return self.changed(own=lambda e: {**e.own, "head.bias": (0, 1)})


class ForgottenBias(Right):
    def experts(self) -> list[Expert]:
        keep = lambda rows: {k: v for k, v in rows.items() if k != "moe.conv.bias"}  # noqa: E731
        return self.changed(own=lambda e: keep(e.own), output=lambda e: keep(e.output))


class OwnsTheRouter(Right):
    def experts(self) -> list[Expert]:
        row = lambda e: {"moe.router.weight": (e.index, e.index + 1)}  # noqa: E731
        return self.changed(own=lambda e: {**e.own, **row(e)})


class MutedInPart(Right):
    """Only the convolution: the norm behind it makes something of its zeros, or of whatever the tap is made to give."""

    def experts(self) -> list[Expert]:
        part = lambda e: {k: v for k, v in e.output.items() if k.startswith("moe.conv")}  # noqa: E731
        return self.changed(output=part)


class TapWithoutEffect(Right):
    """Whether it is muted or not, what comes out of the tap does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Identity()

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        self.aside(torch.ones(len(images), 4 * 8, 1, 1))
        return super().forward_routed(images)

    def experts(self) -> list[Expert]:
        return self.changed(tap=lambda e: self.aside)


class ChangedByWatching(Right):
    def forward_routed(self, images: Tensor) -> RoutedOutput:
        output = super().forward_routed(images)
        return replace(output, logits=output.logits + bool(self.moe.conv._forward_hooks))


class AnothersChannels(Right):
    """The tap's channels are those of the next expert."""

    def experts(self) -> list[Expert]:
        all_channels = [e.channels for e in super().experts()]
        return self.changed(channels=lambda e: all_channels[(e.index + 1) % len(all_channels)])


class RowsInPart(Right):
    """Copying all experts leaves rows that belong to none."""

    def experts(self) -> list[Expert]:
        return self.changed(own=lambda e: {k: (a, b - 1) for k, (a, b) in e.own.items()})


class MaskWithoutEffect(Right):
    def mask_expert(self, expert: Expert) -> None:
        return


class MaskOfAnother(Right):
    def mask_expert(self, expert: Expert) -> None:
        super().mask_expert(super().experts()[expert.index - 1])


class MaskOutsideTheState(Right):
    """It is marked in the state, but works by an attribute that is not saved."""

    masked: tuple[int, ...] = ()

    def mask_expert(self, expert: Expert) -> None:
        self.masked = (*self.masked, expert.index)
        self.norm.num_batches_tracked.add_(1)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        features, routing = self._features(images)
        kept = features.unflatten(1, (4, -1)).clone()
        kept[:, list(self.masked)] = 0
        return RoutedOutput(self.head(kept.flatten(1)), [routing])


class OtherFeatures(Right):
    def extract_features(self, images: Tensor) -> Tensor:
        return super().extract_features(images) * 2


class MapsForFeatures(Right):
    def extract_features(self, images: Tensor) -> Tensor:
        return super().extract_features(images)[..., None, None]

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features.flatten(1))


class LogitsForFeatures(Right):
    def extract_features(self, images: Tensor) -> Tensor:
        return self(images)

    def classify(self, features: Tensor) -> Tensor:
        return features

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        features, routing = self._features(images)
        return RoutedOutput(self.head(features), [routing])


class EarlierFeatures(Right):
    """Before the last activation, which `classify` then applies: no linear layer."""

    def extract_features(self, images: Tensor) -> Tensor:
        return super().extract_features(images) - 0.2

    def classify(self, features: Tensor) -> Tensor:
        return self.head(torch.relu(features + 0.1))

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        _, routing = self._features(images)
        return RoutedOutput(self.classify(self.extract_features(images)), [routing])


WRONG: list[tuple[type[Right], str]] = [
    (OverlappingComponents, "the_parts_are_the_models_own_and_do_not_overlap"),
    (HeadWithoutEffect, "the_head_decides_the_logits_last"),
    (GroupBeyondTheLayer, "what_can_be_pruned_lies_in_the_model"),
    (TapOfAnotherLayer, "channels_that_can_be_pruned_can_be_measured_and_have_an_effect"),
    (GroupWithoutEffect, "channels_that_can_be_pruned_can_be_measured_and_have_an_effect"),
    (TooFewExperts, "experts_are_those_of_the_gates_and_do_not_overlap"),
    (SharedRows, "experts_are_those_of_the_gates_and_do_not_overlap"),
    (ForgottenBias, "the_experts_weights_are_those_of_the_component"),
    (OwnsTheRouter, "the_experts_weights_are_those_of_the_component"),
    (MutedInPart, "a_muted_expert_has_no_effect_and_any_other_has"),
    (TapWithoutEffect, "a_muted_expert_has_no_effect_and_any_other_has"),
    (ChangedByWatching, "replacing_an_experts_output_by_itself_changes_nothing"),
    (AnothersChannels, "an_expert_is_its_own_weights"),
    (RowsInPart, "copying_every_expert_copies_what_they_own_and_nothing_else"),
    (MaskWithoutEffect, "a_masked_expert_has_no_effect_also_after_loading"),
    (MaskOfAnother, "a_masked_expert_has_no_effect_also_after_loading"),
    (MaskOutsideTheState, "a_masked_expert_has_no_effect_also_after_loading"),
    (OtherFeatures, "the_features_are_the_input_of_the_last_linear_layer"),
    (MapsForFeatures, "the_features_are_the_input_of_the_last_linear_layer"),
    (EarlierFeatures, "the_features_are_the_input_of_the_last_linear_layer"),
    (LogitsForFeatures, "the_features_come_before_the_head"),
]


class ByBrightness(RoutedModel):
    """Every patch of 8x8 pixels goes to one expert: to the first if it is darker than a threshold, else to the second.

    No patch of uniform noise is darker than 0.3.
    """

    patch_grid, patch_size, threshold = (4, 4), 8, 0.3

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(3, 2 * 4, 8, stride=8)
        self.loud = nn.Parameter(torch.ones(2 * 4))
        self.head = nn.Linear(4, 3)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        outputs = (self.gate(images) * self.loud.view(-1, 1, 1)).flatten(2).unflatten(1, (2, 4))
        dark = F.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(2) < self.threshold
        selected = torch.cat([dark, ~dark], 1)
        pooled = (outputs * selected.unsqueeze(2)).sum(1).mean(2)
        return RoutedOutput(self.head(pooled), [Routing("gate", selected.float(), selected)])

    def experts(self) -> list[Expert]:
        ranges = [(0, 4), (4, 8)]
        own = [{"gate.weight": part, "gate.bias": part, "loud": part} for part in ranges]
        return [Expert("gate", e, own[e], {"loud": ranges[e]}, self.gate, ranges[e]) for e in (0, 1)]


class WithADeadExpert(ByBrightness):
    threshold = 0.0


def test_an_expert_that_noise_does_not_reach_is_tested_on_other_images(monkeypatch) -> None:
    assert not ByBrightness().forward_routed(test_structure.images()).routing[0].selected[:, 0].any()
    run(test_structure, "a_muted_expert_has_no_effect_and_any_other_has", ByBrightness, monkeypatch)


def test_an_expert_that_no_image_reaches_fails_with_advice(monkeypatch) -> None:
    message = "no patch of the test images was sent to expert gate/0, .*; initialise the router so that"
    with pytest.raises(pytest.fail.Exception, match=message):
        run(test_structure, "a_muted_expert_has_no_effect_and_any_other_has", WithADeadExpert, monkeypatch)


@pytest.mark.parametrize("name", names_of(test_structure))
def test_the_right_model_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(test_structure, name, Right, monkeypatch)


@pytest.mark.parametrize(("kind", "name"), WRONG, ids=lambda value: getattr(value, "__name__", "fails"))
def test_a_wrong_model_fails(kind: type[Right], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ValueError)):
        run(test_structure, name, kind, monkeypatch)


def test_no_conformance_test_is_without_a_wrong_model() -> None:
    assert {name for _, name in WRONG} == {*names_of(test_structure)}
