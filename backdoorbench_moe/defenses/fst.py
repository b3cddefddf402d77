"""FST: re-initialise the head and keep it away from its original weights, so that tuning must shift the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.losses import training_loss
from backdoorbench_moe.defenses.requirements import check_tuning, head_of, router_of
from backdoorbench_moe.defenses.routers import reset_modules
from backdoorbench_moe.moe.routed import forward
from backdoorbench_moe.ops.ranges import check_weight

PARTS = {"head": (head_of,), "router": (router_of,), "head+router": (head_of, router_of)}


class FST(Defense):
    """Feature shift tuning: re-initialise the head, and tune the model with the head kept away from its old weights.

    The loss is that of plain tuning plus `alpha` times the sum of the elementwise product of the head's weight matrix
    and the original one. The norm of the matrix is set to that of the original before every step and at the end. In a
    routed model, the router can be treated in the same way, alone or together with the head; each of its weight
    matrices then has such a term and such a norm. Biases are re-initialised but not constrained.

    The baseline is `fine-tuning` with the same epochs, learning rate and clean images; for "router" it is
    `router-reset` with the scope "all".

    Departures: epochs, learning rate, optimizer, schedule and augmentation are those of `fine-tuning`, so that the two
    can be compared. The source's code uses SGD, 10 epochs, and a learning rate that falls from 0.01 by a cosine.
    Resetting the router is ours.

    Args:
        reset: What is re-initialised: the "head", as in the source; the "router"; or "head+router".
        alpha: Weight of the term that keeps the matrices away from the original ones, at least 0. The source uses 0.1
            or 0.2 on CIFAR-10.
        epochs: Epochs of tuning, from 1.
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1]; 0.02 in the source.

    Raises:
        ConfigError: A value is out of range, or the model has no head, or no router.

    Source:
        Min et al., "Towards stable backdoor purification through feature shift tuning", NeurIPS 2023, eq. 1.
    """

    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        reset: Literal["head", "router", "head+router"] = "head",
        alpha: float = 0.1,
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        check_weight(alpha=alpha)
        self.reset, self.alpha, self.epochs, self.lr = reset, alpha, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not have the component to re-initialise."""
        self._modules(model)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Re-initialise the modules, and tune."""
        modules = self._modules(task.model)
        matrices = [weight for module in modules for weight in module.parameters() if weight.ndim > 1]
        shift = Shift(matrices, [matrix.detach().clone() for matrix in matrices])
        reset_modules(modules, self._modules(task.fresh()))
        shift.keep_norms()
        task.report("reset", task.model)

        def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            shift.keep_norms()
            logits, routing = forward(model, images)
            loss = training_loss(logits, routing, labels, label_smoothing=task.train.label_smoothing)
            return logits, loss + self.alpha * shift.likeness()

        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, objective=objective, augment=True)
        shift.keep_norms()
        return DefenseResult("tuned", task.model)

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        return [module for find in PARTS[self.reset] for module in find(model)]


@dataclass(frozen=True)
class Shift:
    """Weight matrices that are kept away from the original ones, with the same norms.

    Attributes:
        matrices: The parameters, of two or more dimensions.
        originals: Their original values, in the same order.
    """

    matrices: list[nn.Parameter]
    originals: list[Tensor]

    def likeness(self) -> Tensor:
        """Return the sum of the elementwise products of the matrices and the original ones, a scalar."""
        pairs = zip(self.matrices, self.originals, strict=True)
        return torch.stack([(matrix * original).sum() for matrix, original in pairs]).sum()

    @torch.no_grad()
    def keep_norms(self) -> None:
        """Scale each matrix to the norm of its original, in place. A matrix of zeros is not changed."""
        for matrix, original in zip(self.matrices, self.originals, strict=True):
            norm = matrix.norm()
            matrix.mul_(torch.where(norm > 0, original.norm() / norm, 1.0))
