"""Checks of weights, which need no images: experts, their gates, channels and the head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.auditing.check import Check, Measured, Need, NotTested
from backdoorbench_moe.auditing.siblings import FEWEST, find_standout, matrices_of
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.defenses.clp import channel_bounds
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.outlying import groups_of
from backdoorbench_moe.moe.merging import NETWORK
from backdoorbench_moe.moe.structure import Expert, Structured, WithExperts
from backdoorbench_moe.moe.units import gate_units
from backdoorbench_moe.ops.outliers import deviations

# One in a hundred models without a poisoned expert is flagged if the logarithms have one normal distribution.
SURPRISING = 2.0
GRUBBS = "Grubbs, Technometrics 11 (1969), at a level of 1%"
SURPRISE = (
    "-log10 of the probability of so large a difference by chance, corrected for the number of comparisons: "
    "2 is a probability of 1%"
)

Values = dict[str, dict[str, float]]


class SiblingCheck(Check):
    """Base class of checks that compare the experts of a layer with each other.

    Subclasses implement `quantities` and set `compared`, a name of the compared values for the reason.
    """

    needs: ClassVar[tuple[Need, ...]] = ("experts",)
    threshold: ClassVar[float | None] = SURPRISING
    explains: ClassVar[str] = SURPRISE
    source: ClassVar[str] = GRUBBS
    compared: ClassVar[str]

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measured:
        """Find the expert that stands out most."""
        try:
            found, by_expert = find_standout(self.quantities(subject))
        except ValueError as error:
            raise NotTested(f"no layer has at least {FEWEST} experts to compare") from error
        if not found.surprise:
            reason = f"no expert stands out: {self.compared} of all experts are alike"
        else:
            reason = (
                f"expert {found.name}: its {found.quantity} is {found.ratio:.3g} times that of its siblings"
            )
        details = {
            "expert": found.name, "quantity": found.quantity, "ratio": found.ratio, "experts": by_expert
        }  # fmt: skip
        return Measured(found.surprise, reason, details)

    @abstractmethod
    def quantities(self, subject: Subject) -> Values:
        """Return the values of the compared quantities, by name of the quantity and name of the expert."""


class GateRows(SiblingCheck):
    """Whether the router's row of an expert is longer or shorter than those of the others."""

    name = "gate-rows"
    title = "gates that stand out"
    compared = "the rows of the router"

    def quantities(self, subject: Subject) -> Values:
        """Return the norm of each expert's row of the router, for each layer."""
        state = subject.model.state_dict()
        found: Values = {}
        for units in gate_units(subject.model):
            [name] = units.rows
            lengths = state[name].double().norm(dim=1).tolist()
            found[f"row of the router in {units.layer}"] = dict(zip(units.names, lengths, strict=True))
        if not found:
            raise NotTested(f"{type(subject.model).__name__} has no routers with one row for each expert")
        return found


class ExpertNorms(SiblingCheck):
    """Whether the weights of an expert are larger or smaller than those of the others."""

    name = "expert-norms"
    title = "experts whose weights stand out"
    compared = "the weights"

    def quantities(self, subject: Subject) -> Values:
        """Return the Frobenius norm of each weight matrix."""
        return by_matrix(subject.model, {"norm": lambda matrix: matrix.norm().item()})


class ExpertSpectra(SiblingCheck):
    """Whether the singular values of an expert's weights differ from those of the others."""

    name = "expert-spectra"
    title = "experts whose spectra stand out"
    compared = "the spectra"

    def quantities(self, subject: Subject) -> Values:
        """Return the largest singular value and the stable rank of each weight matrix."""
        return by_matrix(
            subject.model, {"largest singular value": largest_singular, "stable rank": stable_rank}
        )


class ExpertDistance(SiblingCheck):
    """Whether the distance of an expert from the base is larger or smaller than those of the others."""

    name = "expert-distance"
    title = "experts far from the base"
    needs = ("experts", "base")
    compared = "the distances from the base"

    def quantities(self, subject: Subject) -> Values:
        """Return the distance of each expert's weight matrices from those of the base."""
        assert subject.base is not None
        return distances(subject.model, subject.base)


def by_matrix(model: nn.Module, measures: Mapping[str, Callable[[Tensor], float]]) -> Values:
    """Measure every weight matrix of every expert.

    Args:
        model: A model with experts.
        measures: Functions of a weight matrix, by name.

    Returns:
        The values of the experts by name, for each measure, layer and weight matrix.
    """
    assert isinstance(model, WithExperts)
    state, found = model.state_dict(), dict[str, dict[str, float]]()
    for expert in model.experts():
        for number, matrix in enumerate(matrices_of(state, expert.own)):
            for name, measure in measures.items():
                place = f"{name} of weight matrix {number} in {expert.layer}"
                found.setdefault(place, {})[expert.name] = measure(matrix)
    return found


def largest_singular(matrix: Tensor) -> float:
    """Return the largest singular value of (rows, columns)."""
    return torch.linalg.matrix_norm(matrix, ord=2).item()


def stable_rank(matrix: Tensor) -> float:
    """Return the squared Frobenius norm, divided by the square of the largest singular value; 0 for zeros.

    It lies between 1 and the rank, and is small if one direction dominates.
    """
    largest = largest_singular(matrix)
    return (matrix.norm().item() / largest) ** 2 if largest else 0.0


def distances(model: nn.Module, base: Mapping[str, Tensor]) -> Values:
    """Return the distance between the weight matrices of each expert and of the base, relative to the norm of the base.

    Args:
        model: A model with experts.
        base: The state dict of the dense model that the experts of a merged model were fine-tuned from, or of a model
            of the same architecture.

    Raises:
        NotTested: The base does not contain the expert's tensors.
    """
    assert isinstance(model, WithExperts)
    found: Values = {}
    for expert in model.experts():
        for number, (matrix, other) in enumerate(_pairs(model, expert, base)):
            place = f"distance of weight matrix {number} in {expert.layer} from the base"
            scale = other.norm().item() or 1.0
            found.setdefault(place, {})[expert.name] = (matrix - other).norm().item() / scale
    return found


def _pairs(model: nn.Module, expert: Expert, base: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weight matrices of an expert and the corresponding matrices of the base."""
    state = model.state_dict()
    for name, (start, stop) in expert.own.items():
        own, dense = state[name][start:stop], name.removeprefix(NETWORK).replace(".experts.", ".")
        if own.ndim < 2:
            continue
        if name in base and base[name].shape == state[name].shape:
            other = base[name][start:stop]
        elif dense in base and base[dense].shape == own.shape:
            other = base[dense]
        else:
            raise NotTested(f"the base is of another architecture: it does not have {name} or {dense}")
        yield own.double().flatten(1).cpu(), other.double().flatten(1).cpu()


class ChannelNorms(Check):
    """Whether a channel can amplify a change of its input much more than the other channels of its layer."""

    name = "channel-norms"
    title = "channels that stand out"
    explains = (
        "how many standard deviations a channel's Lipschitz bound lies above the mean of its layer or expert"
    )
    source = "Zheng et al., ECCV 2022 (CLP); it prunes above 3, which channels of clean models exceed, too"

    def cost(self, subject: Subject) -> Cost:
        """Return the cost of finding the convolutions before the norms with two images of noise."""
        return Cost(predicted=2)

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measured:
        """Find the channel that lies furthest above the mean of its group, in standard deviations."""
        model = subject.model
        if subject.image_size is None:
            raise NotTested("the size of the images that the model takes is not known")
        bounds = channel_bounds(model, subject.image_size)
        by_expert = isinstance(model, WithExperts)
        groups = [
            group
            for layer, values in bounds.items()
            for group in groups_of(model, layer, values, experts=by_expert)
        ]
        if not groups:
            raise NotTested(f"{type(model).__name__} has no channels whose Lipschitz bounds can be compared")
        most = {group.name: group.most() for group in groups}
        worst = max(groups, key=lambda group: most[group.name])
        channel = worst.start + int(deviations(worst.scores).argmax())
        reason = (
            f"channel {channel} of {worst.name} can amplify a change of its input more than the others: "
            f"its bound is {most[worst.name]:.1f} standard deviations above their mean"
        )
        return Measured(most[worst.name], reason, {"channel": channel, "groups": most})


class HeadRows(Check):
    """Whether the weights of one class in the last layer are larger than those of the other classes."""

    name = "head-rows"
    title = "classes that stand out in the last layer"
    explains = SURPRISE
    threshold = SURPRISING
    source = "Fields et al., ICCVW 2021 (Trojan signatures); the test is Grubbs' instead of Dixon's"

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measured:
        """Compare the mean weights of the classes."""
        weight = head_weight(subject.model)
        means = weight.mean(1)
        # The mean over the classes is subtracted, since adding a constant to all logits changes no prediction.
        spread = (weight - weight.mean(0)).std(1)
        means = (means - means.mean()) / spread.mean().clamp(min=1e-12)
        scored = (means.exp()).tolist()
        try:
            found, by_class = find_standout(
                {"mean weight": {str(c): value for c, value in enumerate(scored)}}, direction="up"
            )
        except ValueError as error:
            raise NotTested(f"fewer than {FEWEST} classes cannot be compared") from error
        reason = (
            f"{subject.class_name(found.name)}: the mean of its weights in the last layer lies above those of the "
            "other classes"
            if found.surprise
            else "no class has larger weights in the last layer than the others"
        )
        return Measured(found.surprise, reason, {"class": found.name, "classes": by_class})


def head_weight(model: nn.Module) -> Tensor:
    """Return the weights of the last linear layer, (classes, D) float64 on the CPU.

    It is the head in the model's `components()`, or otherwise the last linear layer in the order of its modules.

    Raises:
        NotTested: There is no linear layer.
    """
    named = model.components().get("head", []) if isinstance(model, Structured) else []
    linear = [m for part in (named or [model]) for m in part.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise NotTested(f"{type(model).__name__} has no linear layer at its end")
    return linear[-1].weight.double().cpu()
