"""What defenses of mixtures share: the parts of a mixture, and a loss on marked and clean images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.layers import MoELayer
from backdoorbench_moe.moe.merging import MergedModel
from backdoorbench_moe.moe.routed import auxiliary_loss
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.ops.tuning import Objective

# From the logits (B, classes) of marked images, their gates (B, E, P) by layer, and their rows of labels to a scalar.
MarkedLoss = Callable[[Tensor, list[Tensor], Tensor], Tensor]


def mixture_of(model: object) -> MergedModel:
    """Return the model as a mixture of merged experts.

    Raises:
        ConfigError: It is another model.
    """
    if not isinstance(model, MergedModel):
        raise ConfigError(f"model: expected a mixture of merged experts, got {type(model).__name__}")
    return model


def images_of_task(mixture: object, held: int) -> int:
    """Return how many clean images of each task of a mixture the defender holds, who holds `held` in all."""
    return max(1, held // mixture_of(mixture).num_experts)


def routers_of(mixture: MergedModel) -> list[nn.Module]:
    """Return the routers of a mixture, first layer first."""
    return [layer.router for layer in mixture.layers()]


def experts_in(layers: list[MoELayer]) -> list[nn.Module]:
    """Return the modules of the experts of some layers."""
    return [layer.experts for layer in layers]


def alignment_objective(marked_loss: MarkedLoss, clean: Split, clean_weight: float) -> Objective:
    """Return the loss of a mixture on marked images and on clean ones.

    Each batch of marked images is passed through the model together with as many clean ones, drawn with replacement
    from torch's global generator. The loss is that of the marked images, plus `clean_weight` times the cross-entropy of
    the clean ones, plus the auxiliary losses of those routers that are trained.

    Args:
        marked_loss: The loss of the marked images.
        clean: The clean images and their labels.
        clean_weight: Weight of their cross-entropy, at least 0.
    """

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(model, MergedModel)
        count = len(images)
        rows = torch.randint(len(clean), (count,), device=images.device)
        output = model.forward_routed(torch.cat([images, as_input(clean.images[rows])]))
        marked, others = output.logits.float().split(count)
        loss = marked_loss(marked, [routing.gates[:count] for routing in output.routing], labels)
        loss = loss + clean_weight * F.cross_entropy(others, clean.labels[rows])
        return marked, loss + auxiliary_loss(output.routing)

    return objective
