"""The conformance tests fail for models that the engine cannot train, and for defenses that leave something behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe import defenses
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.models.pmoe import PMoE
from backdoorbench_moe.moe.routed import RoutedOutput
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing import test_defenses, test_models


class Right(PMoE):
    """A small pMoE."""

    def __init__(self) -> None:
        options: dict[str, Any] = {**PMoE.tiny, "num_classes": 10}
        super().__init__(**options)


class InFloat32(Right):
    """Under autocast, the logits are bfloat16, and the table is float32."""

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        output = super().forward_routed(images)
        table = torch.zeros(output.logits.shape)
        rows = torch.arange(len(images))
        return replace(output, logits=table.index_add(0, rows, output.logits))


class KeepsLogits(Right):
    def forward_routed(self, images: Tensor) -> RoutedOutput:
        output = super().forward_routed(images)
        self.last = output.logits
        return output


class WithLoss(Right):
    """A loss for each image, instead of their mean."""

    def loss(self, gates: Tensor) -> Any:
        return gates.square().mean((1, 2))

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        output = super().forward_routed(images)
        routing = [replace(each, aux_loss=self.loss(each.gates)) for each in output.routing]
        return replace(output, routing=routing)


class LossIsNumber(WithLoss):
    def loss(self, gates: Tensor) -> Any:
        return 0.1


class LossIsNaN(WithLoss):
    def loss(self, gates: Tensor) -> Any:
        return (gates - gates).log().sum() - (gates - gates).log().sum()


def run(name: str, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one conformance test of models."""

    def build(_: str) -> nn.Module:
        with seeded(0, "init"):
            return kind()

    monkeypatch.setattr(test_models, "build_model", build)
    getattr(test_models, f"test_{name}")("under test")


@pytest.mark.parametrize("name", ["it_runs_in_bfloat16", "it_can_be_copied_after_a_training_step"])
def test_the_right_model_passes(name, monkeypatch) -> None:
    run(name, Right, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        (InFloat32, "it_runs_in_bfloat16", RuntimeError),
        (WithLoss, "it_runs_in_bfloat16", AssertionError),
        (LossIsNumber, "it_runs_in_bfloat16", AssertionError),
        (LossIsNaN, "it_runs_in_bfloat16", AssertionError),
        (KeepsLogits, "it_can_be_copied_after_a_training_step", RuntimeError),
    ],
)
def test_a_wrong_model_fails(kind, name, error, monkeypatch) -> None:
    with pytest.raises(error):
        run(name, kind, monkeypatch)


class Nothing(Defense):
    """Changes nothing."""

    def change(self, model: PMoE) -> None:
        """Change the model, which is a pMoE."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Return the model."""
        assert isinstance(task.model, PMoE)
        self.change(task.model)
        return DefenseResult("changed", task.model)


class LeavesAHook(Nothing):
    def change(self, model: PMoE) -> None:
        model.reduce.register_full_backward_hook(lambda *_: None)


class ReplacesAFunction(Nothing):
    """The state of the model does not say that the logits are halved."""

    def change(self, model: PMoE) -> None:
        model.head.forward = lambda values: nn.Linear.forward(model.head, values) / 2


class LeavesGradientsOff(Nothing):
    def change(self, model: PMoE) -> None:
        torch.set_grad_enabled(False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LeavesAHook, "hooks are left on"),
        (ReplacesAFunction, "loads the state of the defended one gives other logits"),
        (LeavesGradientsOff, "a global setting of torch was changed"),
    ],
)
def test_a_defense_that_leaves_something_behind_fails(kind, message, monkeypatch) -> None:
    for part in (Nothing, kind):
        monkeypatch.setitem(defenses.registry._local, "own", part)
        with torch.enable_grad():
            if part is Nothing:
                test_defenses.assert_defended("own", "pmoe")
            else:
                with pytest.raises(AssertionError, match=message):
                    test_defenses.assert_defended("own", "pmoe")
