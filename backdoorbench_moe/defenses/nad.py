"""NAD: distil the attention maps of a teacher, the model after plain tuning, into the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.losses import training_loss
from backdoorbench_moe.defenses.requirements import Scope, check_routed, check_tuning, modules_in, router_of
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.feature_maps import (
    FeatureMap,
    check_names,
    collect_feature_maps,
    find_feature_maps,
    named_feature_maps,
)
from backdoorbench_moe.moe.routed import Routing, forward
from backdoorbench_moe.moe.trial import noise_for
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.ops.ranges import check_integer, check_weight


class NAD(Defense):
    """Neural attention distillation: tune a copy of the model, the teacher, then distil its attention into the model.

    The attention of a feature map is the sum of its squares over the channels, divided by the L2 norm of these sums
    over all positions. The loss is that of plain tuning plus, for each map, beta times the mean squared difference
    between the attention of the model and that of the teacher, over images and positions.

    The maps are the outputs of the last block at each of the last three resolutions; in a transformer, those of three
    equally spaced blocks. In pMoE, the last map is that of the experts (`trunk.block1`, `trunk`, `moe.conv`). In a
    model with MoE layers, the blocks contain the experts. With `maps="trunk"`, only maps before the first experts are
    used. The gates can be an additional map: the gates of each expert over the patches, divided by their L2 norm.

    The teacher is the model after plain tuning. It is evaluated as the stage "teacher", which has the same weights as
    after `fine-tuning` with the same scope, epochs, learning rate and clean images. Only improvements over that stage
    are due to the distillation.

    Departures: epochs, learning rate, optimizer, schedule and augmentation are those of `fine-tuning`. The source tunes
    the teacher for 10 epochs and the model for 20, with SGD and a learning rate of 0.1. The map of the gates is ours.

    Args:
        maps: "all"; or "trunk", those before the first experts of a routed model.
        layers: Dotted names of the modules whose outputs are the maps, instead of those that `maps` chooses.
        betas: Weight of each map, from the first to the last, at least 0 each. If a model has fewer maps, the last
            weights are used. The defaults are those of the source's code.
        gate_weight: Weight of the gates of all routed layers, at least 0. Above 0, it requires a routed model.
        scope: What is trained, in the teacher and in the model: "all", or the component "experts", "router" or "head".
        teacher_epochs: Epochs of plain tuning of the teacher, from 1; `epochs` if None.
        epochs: Epochs of the distillation, from 1.
        lr: Peak learning rate, above 0, for both; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range; or the model does not have feature maps, a named module or the component.

    Source:
        Li et al., "Neural attention distillation: erasing backdoor triggers from deep neural networks", ICLR 2021,
        eq. 1 to 3. The mean squared difference replaces the L2 norm of eq. 2, as in the authors' code (bboylyg/NAD),
        for which the betas were chosen.
    """

    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        maps: Literal["all", "trunk"] = "all",
        layers: tuple[str, ...] | None = None,
        betas: tuple[float, ...] = (500.0, 1000.0, 1000.0),
        gate_weight: float = 0.0,
        scope: Scope = "all",
        teacher_epochs: int | None = None,
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        check_integer("teacher_epochs", teacher_epochs, 1)
        if not betas:
            raise ConfigError.expected("betas", "at least one number", betas)
        check_weight(gate_weight=gate_weight)
        for beta in betas:
            check_weight(betas=beta)
        if layers is not None and len(layers) != len(betas):
            raise ConfigError.expected("layers", f"{len(betas)} names, as many as there are betas", layers)
        if layers is not None and maps != "all":
            raise ConfigError.expected("maps", "'all' where `layers` names the maps", maps)
        self.maps, self.layers, self.betas, self.gate_weight = maps, layers, betas, gate_weight
        self.scope, self.teacher_epochs, self.epochs, self.lr = scope, teacher_epochs or epochs, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not have the component, the modules, or the gates."""
        modules_in(model, self.scope)
        if self.maps == "trunk":
            router_of(model)
        if self.gate_weight:
            check_routed(model)
        check_names(model, self.layers or ())

    def check_images(self, model: nn.Module, image_size: int) -> None:
        """Raise ConfigError if the model has no feature maps, or the output of a named module is not a feature map."""
        with noise_for(model, image_size) as images:
            self._find_maps(model, images)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Find the feature maps with two images, tune the teacher, then the model with a pass of the teacher."""
        return Cost(trained=(self.teacher_epochs + self.epochs) * held, predicted=2 + self.epochs * held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Tune the teacher, then the model."""
        model, modules = task.model, modules_in(task.model, self.scope)
        maps = self._find_maps(model, as_input(task.clean.images[:2]))
        teacher = copy.deepcopy(model)
        task.tune(
            teacher,
            task.clean,
            epochs=self.teacher_epochs,
            lr=self.lr,
            modules=modules_in(teacher, self.scope),
        )
        task.report("teacher", teacher)
        with collect_feature_maps(model, maps) as own, collect_feature_maps(teacher, maps) as taught:

            def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    _, wanted = forward(teacher, images)
                logits, routing = forward(model, images)
                loss = training_loss(logits, routing, labels, label_smoothing=task.train.label_smoothing)
                for beta, features, target in zip(self.betas[-len(maps) :], own, taught, strict=True):
                    loss = loss + beta * attention_distance(features, target)
                if self.gate_weight:
                    loss = loss + self.gate_weight * gate_distance(routing, wanted)
                return logits, loss

            task.tune(
                model,
                task.clean,
                epochs=self.epochs,
                lr=self.lr,
                modules=modules,
                objective=objective,
                augment=True,
            )
        return DefenseResult("distilled", model)

    def _find_maps(self, model: nn.Module, images: Tensor) -> list[FeatureMap]:
        if self.layers is not None:
            return named_feature_maps(model, images, self.layers)
        return find_feature_maps(model, images, count=len(self.betas), before_experts=self.maps == "trunk")


def attention(features: Tensor) -> Tensor:
    """Return the attention of a feature map: the sum of squares over the channels, normalised over the positions.

    Args:
        features: (B, C, P), C channels at P positions.

    Returns:
        (B, P) float32, of L2 norm 1; zeros if all features are 0.
    """
    return F.normalize(features.float().square().sum(1), dim=1)


def attention_distance(features: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of two attentions, over images and positions, a scalar.

    Args:
        features: (B, C, P).
        target: (B, C, P), the features of the teacher; C may differ.
    """
    return F.mse_loss(attention(features), attention(target))


def gate_distance(routing: list[Routing], target: list[Routing]) -> Tensor:
    """Return the distance between the gates of two models over the patches, summed over the routed layers, a scalar.

    The gates of each expert are divided by their L2 norm over the patches. The distance in a layer is the mean squared
    difference over images, experts and patches.
    """
    pairs = zip(routing, target, strict=True)
    distances = [
        F.mse_loss(F.normalize(own.gates.float(), dim=2), F.normalize(other.gates.float(), dim=2))
        for own, other in pairs
    ]
    return torch.stack(distances).sum()
