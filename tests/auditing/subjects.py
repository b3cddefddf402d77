"""Models with planted signs, and what an audit is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.auditing.check import Check, Measured, NotTested
from backdoorbench_moe.auditing.checks import find_checks
from backdoorbench_moe.auditing.subject import Subject, make_subject
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.layers import TopKRouter
from backdoorbench_moe.moe.merging import MergedModel
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import coloured_split, settle

EXPERTS = 6


def small_pmoe(experts: int = EXPERTS, *, seed: int = 0) -> nn.Module:
    """An untrained pMoE of three classes."""
    with seeded(seed, "init"):
        model = create_model(
            "pmoe",
            num_classes=3,
            widen_factor=1,
            moe_channels=8,
            num_experts=experts,
            expert_channels=5,
            gate_std=1.0,
        )
    return settle(model)


def merged(experts: int = EXPERTS, *, seed: int = 0) -> tuple[MergedModel, nn.Module]:
    """A mixture whose experts are their base, shaken a little, each in its own way; and the base."""
    with seeded(seed, "init"):
        base = settle(create_model("convnext", num_classes=3, features=8, depth=2))
        mixture = MergedModel(base, experts, lambda d, e: TopKRouter(d, e, top_k=1, gate_std=1.0)).eval()
        state = mixture.state_dict()
        for expert in mixture.experts():
            for name, (start, stop) in expert.own.items():
                rows = state[name][start:stop]
                if rows.ndim == 1:
                    continue  # Biases, and the buffer that says whether an expert is heard.
                rows.add_(0.02 * torch.randn(rows.shape))
    return mixture, base


def look(model: nn.Module, name: str, **given: object) -> Measured:
    """What one check measures."""
    [check] = find_checks([name])
    return check.run(make_subject(model, **given))  # type: ignore[arg-type]


def images(count: int = 24) -> Split:
    """Labelled images of three classes."""
    return coloured_split(count, 3)


class Constant(Check):
    """A check with a given score."""

    title, explains, version = "a constant", "a number", 1

    def __init__(self, name: str, score: float | None, threshold: float | None = 1.0) -> None:
        self.name, self.score, self.threshold, self.runs = name, score, threshold, 0  # type: ignore[misc]

    def measure(self, subject: Subject) -> Measured:
        """Count the call, and give the score."""
        self.runs += 1
        if self.score is None:
            raise NotTested("nothing to see")
        return Measured(
            self.score, f"{self.name} measured {self.score:g}", {"runs": self.runs, "bad": float("nan")}
        )


class Rows(nn.Module):
    """Calls an image the brightest of its rows; the mean of the others does not matter."""

    def __init__(self, classes: int = 6, side: int = 8) -> None:
        super().__init__()
        self.classes = classes
        self.layer = nn.Linear(3 * side * side, classes)
        weights = torch.zeros(classes, 3, side, side)
        for label in range(classes):
            weights[label, :, label] = 1.0
        with torch.no_grad():
            self.layer.weight.copy_(weights.flatten(1))
            self.layer.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))
