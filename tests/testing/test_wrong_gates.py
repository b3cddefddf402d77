"""Every conformance test of gates fails for a gate that is wrong in what it tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from backdoorbench_moe import gates
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.gates.hidden import Hidden
from backdoorbench_moe.gates.top_k import TopK
from backdoorbench_moe.moe.layers import Router, RouterOutput, TopKRouter, TopKSoftmaxRouter
from backdoorbench_moe.testing import test_gates


class WrongTopK(TopK):
    """A `top-k` with another router."""

    router: ClassVar[type[TopKSoftmaxRouter]]

    def build(self, features: int, num_experts: int) -> Router:
        return self.router(features, num_experts, top_k=self.top_k)


def with_router(kind: type[TopKSoftmaxRouter]) -> type[Gate]:
    """The gate of a wrong router, under its name."""
    return type(kind.__name__, (WrongTopK,), {"router": kind})


def own_noise(like: Tensor) -> Tensor:
    """Noise that no seed decides."""
    generator = torch.Generator()
    generator.seed()
    return torch.randn(like.shape, generator=generator)


class WeightsWithoutSeed(TopKSoftmaxRouter):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight.data = 1e-3 * own_noise(self.weight)


class NoiseWithoutSeed(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        return super().choose(logits + own_noise(logits))


class WritesToTokens(TopKSoftmaxRouter):
    def forward(self, tokens: Tensor) -> RouterOutput:
        return super().forward(tokens.mul_(2))


class SelectsOthers(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        routed = super().choose(logits)
        return replace(routed, selected=routed.selected.roll(1, -1))


class CountsWrong(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        routed = super().choose(logits)
        pairs = routed.assignment
        return replace(routed, assignment=replace(pairs, counts=pairs.counts.roll(1) + 1))


class DoublesInTraining(TopKSoftmaxRouter):
    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen, weights = super().select(logits)
        return chosen, weights * (2 if self.training else 1)


class IgnoresTheMask(TopKSoftmaxRouter):
    def forward(self, tokens: Tensor) -> RouterOutput:
        masked = self.masked.clone()
        self.masked.zero_()
        routed = super().forward(tokens)
        self.masked.copy_(masked)
        return routed


class DropsMaskedChoices(TopKSoftmaxRouter):
    """A token whose first choice is masked keeps only its other choices, which do not get the rest of the weight."""

    def choose(self, logits: Tensor) -> RouterOutput:
        unmasked = torch.nn.functional.linear(test_gates.make_tokens(), self.weight)
        return super().choose(unmasked)


class MinusInfinity(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        return super().choose(logits.masked_fill(self.masked, -torch.inf))


class HalfPrecision(TopKSoftmaxRouter):
    def forward(self, tokens: Tensor) -> RouterOutput:
        return self.choose(torch.nn.functional.linear(tokens, self.weight).float())


class Centres(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        return super().choose(logits - logits.mean((0, 1)))


class LearnsInEvaluation(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        self.weight.data.mul_(1.01)
        return super().choose(logits)


class Forgets(TopKSoftmaxRouter):
    """Its schedule is not part of its state."""

    passes = 0

    def choose(self, logits: Tensor) -> RouterOutput:
        self.passes += self.training
        return super().choose(logits * self.passes)


class ReadsBack(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        return super().choose(logits / max(1.0, logits.max().item()))


class NoGradient(TopKSoftmaxRouter):
    def choose(self, logits: Tensor) -> RouterOutput:
        return super().choose(logits.detach())


class NotNormalised(TopK):
    """As in V-MoE, the weights are the gates."""

    def build(self, features: int, num_experts: int) -> Router:
        return TopKRouter(features, num_experts, top_k=self.top_k, gate_std=1e-3, noise=0.0, capacity=None)


class FarFromEven(TopK):
    def build(self, features: int, num_experts: int) -> Router:
        return TopKSoftmaxRouter(features, num_experts, top_k=self.top_k, gate_std=1.0)


class TiesDecide(TopK):
    def build(self, features: int, num_experts: int) -> Router:
        return TopKSoftmaxRouter(features, num_experts, top_k=self.top_k, gate_std=0.0)


class NotForOneExpert(TopK):
    def build(self, features: int, num_experts: int) -> Router:
        return super().build(features, max(2, num_experts))


class AnyTopK(TopK):
    """More experts than there are become all of them."""

    def check(self, num_experts: int) -> None:
        self.top_k = min(self.top_k, num_experts)


class IgnoresTheStates(Hidden):
    def set_from_states(self, router: Router, states: Tensor) -> None:
        super().set_from_states(router, torch.eye(*states.shape))


class OppositeStates(Hidden):
    def set_from_states(self, router: Router, states: Tensor) -> None:
        super().set_from_states(router, -states)


class TrainedByStates(TopK):
    def set_from_states(self, router: Router, states: Tensor) -> None:
        Hidden().set_from_states(router, states)


TRAINING, EVALUATION = {"training": True}, {"training": False}
WRONG: list[tuple[type, str, dict[str, Any]]] = [
    (WeightsWithoutSeed, "the_seed_decides_the_weights", {}),
    (TiesDecide, "the_seed_decides_the_weights", {}),
    (NoiseWithoutSeed, "the_seed_decides_the_routing", EVALUATION),
    (WritesToTokens, "the_seed_decides_the_routing", TRAINING),
    (SelectsOthers, "the_parts_of_the_output_agree", TRAINING),
    (CountsWrong, "the_parts_of_the_output_agree", EVALUATION),
    (NotNormalised, "weights_sum_to_one_in_evaluation", {}),
    (DoublesInTraining, "weights_sum_to_at_most_one_in_training", {}),
    (NotNormalised, "equal_experts_give_what_one_gives", {}),
    (NotForOneExpert, "a_single_expert", {}),
    (IgnoresTheMask, "a_masked_expert_gets_no_token_and_others_take_over", {"expert": 1, **TRAINING}),
    (DropsMaskedChoices, "a_masked_expert_gets_no_token_and_others_take_over", {"expert": 1, **EVALUATION}),
    (MinusInfinity, "nothing_is_routed_and_all_is_finite_if_every_expert_is_masked", TRAINING),
    (HalfPrecision, "routing_is_computed_in_full_precision", EVALUATION),
    (Centres, "tokens_do_not_mix_in_evaluation", {}),
    (LearnsInEvaluation, "training_mode_changes_no_parameters_and_evaluation_nothing", {}),
    (Forgets, "routers_with_the_same_state_are_the_same", TRAINING),
    (ReadsBack, "nothing_is_read_back_from_the_device", TRAINING),
    (NoGradient, "a_gradient_reaches_every_parameter_of_a_trained_gate", {}),
    (FarFromEven, "a_trained_gate_starts_nearly_even", {}),
    (TiesDecide, "each_expert_is_chosen_at_the_start", {}),
    (IgnoresTheStates, "hidden_states_set_a_gate_that_is_not_trained", {}),
    (OppositeStates, "hidden_states_set_a_gate_that_is_not_trained", {}),
    (TrainedByStates, "hidden_states_set_a_gate_that_is_not_trained", {}),
    (AnyTopK, "a_top_k_out_of_range_is_refused", {}),
]


@pytest.fixture
def wrong() -> Iterator[str]:
    """The name under which a wrong gate is registered."""
    yield "wrong"
    gates.registry.unregister("wrong")


@pytest.mark.parametrize(
    ("kind", "name", "case"), WRONG, ids=lambda value: getattr(value, "__name__", "fails")
)
def test_a_wrong_gate_fails(kind: type, name: str, case: dict[str, Any], wrong: str) -> None:
    gate = kind if issubclass(kind, Gate) else with_router(kind)
    gates.registry.register(wrong)(gate)
    # What reads back from the device "meta" gets torch's own error.
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception, PluginError)):
        getattr(test_gates, f"test_{name}")(wrong, **case)


def test_no_conformance_test_is_without_a_wrong_gate() -> None:
    tests = {name.removeprefix("test_") for name in vars(test_gates) if name.startswith("test_")}
    assert tests - {name for _, name, _ in WRONG} == {"unknown_options_are_refused_by_name"}
