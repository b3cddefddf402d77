"""FT-SAM: tune on clean images with sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.losses import training_loss
from backdoorbench_moe.defenses.requirements import Scope, check_tuning, modules_in
from backdoorbench_moe.moe.routed import forward
from backdoorbench_moe.ops.ranges import check_interval, check_positive
from backdoorbench_moe.ops.sharpness import steepest_shift


class FTSAM(Defense):
    """Tune on clean images with sharpness-aware minimisation, which lowers the norms of backdoor-related neurons.

    Every step passes its batch through the model twice: the first pass finds the perturbation of the weights, within a
    ball, that raises the loss most; the gradient of the loss at the perturbed weights then updates the weights. The
    running statistics of norms change in the first pass only. All weights in scope are perturbed together, in one ball.

    The baseline is `fine-tuning` with the same scope, epochs, learning rate and clean images.

    Departures: epochs, learning rate, optimizer, schedule and augmentation are those of `fine-tuning`, so that the two
    can be compared; the source's code uses SGD with a learning rate of 0.01 for 50 to 100 epochs. The auxiliary losses
    of routed layers are part of the loss.

    Args:
        scope: What is trained and perturbed: "all", or the component "experts", "router" or "head". The rest of the
            model keeps its weights and the running statistics of its norms.
        rho: Radius of the ball, above 0. The default is that of the source on CIFAR-10. Without `adaptive`, 0.05 is
            usual.
        adaptive: Whether the perturbation of each weight is measured relative to the weight, as in the source.
        label_smoothing: Share of the target that is distributed equally over all classes, in [0, 1).
        epochs: Epochs of training, from 1.
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the model does not have the component.

    Source:
        Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization", ICCV 2023, eq. 2
        and 3.
    """

    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        scope: Scope = "all",
        rho: float = 2.0,
        adaptive: bool = True,
        label_smoothing: float = 0.1,
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        check_positive(rho=rho)
        check_interval("label_smoothing", label_smoothing, "[0, 1)")
        self.scope, self.rho, self.adaptive, self.label_smoothing = scope, rho, adaptive, label_smoothing
        self.epochs, self.lr = epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not have the component."""
        modules_in(model, self.scope)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Pass each batch forward and backward twice."""
        return Cost(trained=2 * self.epochs * held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Train what is in scope."""
        task.tune(
            task.model,
            task.clean,
            epochs=self.epochs,
            lr=self.lr,
            modules=modules_in(task.model, self.scope),
            objective=self.sharp_loss,
            augment=True,
        )
        return DefenseResult("tuned", task.model)

    def sharp_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the model, and its loss with perturbed weights. See `ops.tuning.Objective`.

        The perturbation is a constant, so the gradient with respect to the weights is that at the perturbed weights.
        """
        loss_of = Loss(model, self.label_smoothing)
        weights = {name: weight for name, weight in loss_of.named_parameters() if weight.requires_grad}
        logits, loss = loss_of(images, labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        shifts = steepest_shift(list(weights.values()), gradients, rho=self.rho, adaptive=self.adaptive)
        shifted = {name: weights[name] + shift for name, shift in zip(weights, shifts, strict=True)}
        # The second pass writes into copies of the running statistics.
        statistics = {name: buffer.clone() for name, buffer in loss_of.named_buffers()}
        _, sharp = functional_call(loss_of, {**shifted, **statistics}, (images, labels))
        return logits, sharp


class Loss(nn.Module):
    """The loss of plain tuning as a module, which lets `functional_call` replace the weights of the model.

    Args:
        model: The model.
        label_smoothing: See `training_loss`.
    """

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, W) and labels (B,) to logits (B, classes) and the loss, a scalar."""
        logits, routing = forward(self.model, images)
        return logits, training_loss(logits, routing, labels, label_smoothing=self.label_smoothing)
