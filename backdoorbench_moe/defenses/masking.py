"""Learned masks of channels, experts and gates, and pruning by these masks, shared by ANP and RNP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.requirements import clean_accuracy, treats_experts
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.precision import in_precision
from backdoorbench_moe.moe.temporary import restored
from backdoorbench_moe.moe.units import Units, expert_units, gate_units, masked_tensors, norm_units, prune
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.ops.ranges import check_interval, check_weight
from backdoorbench_moe.ops.seeding import generator

Masks = Sequence[tuple[Units, Tensor]]

# Thresholds that are tried if the clean accuracy decides.
LADDER = tuple(step / 20 for step in range(20))
# A single image has no batch statistics.
FEWEST_IMAGES = 2
# Lowest mask of an expert while masks are learned. At 0, scale and shift of a norm are both 0; the ReLU after it then
# passes no gradient, so the mask could never rise again.
LEAST_EXPERT = 1e-3


class MaskPruning(Defense):
    """Base class of defenses that learn a mask in [0, 1] for each unit of the model, and prune those with a low mask.

    The units are the channels of all norms with a scale (batch, layer and group norms) and, in the MoE form, complete
    experts and their gates. A pruned channel has a scale of zero and keeps its shift, a pruned expert is muted, and a
    pruned gate is a row of zeros in the router. Every routed layer keeps at least the expert with the highest mask.
    Experts that an earlier defense has muted or masked have no mask.

    Subclasses implement `learn_masks`. They set `reason`, the meaning of a low mask, and `strength`, the name of the
    option that is too large if the masks are not finite.

    Args:
        threshold: Units with a mask of at most this value are pruned, in [0, 1). Below 0.001, no expert is pruned,
            since masks of experts cannot be lower; see `LEAST_EXPERT`.
        accuracy_drop: If given, it replaces `threshold`: thresholds are tried in the order 0, 0.05, ... 0.95, and the
            last one is used before accuracy on the defender's images falls by more than this many percentage points. If
            it falls by more at 0, nothing is pruned.
        experts: Whether to mask complete experts and their gates, too. None: True if the model names its experts.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range.
    """

    reason: str
    strength: str

    def __init__(
        self, *, threshold: float, accuracy_drop: float | None, experts: bool | None, clean_fraction: float
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_interval("threshold", threshold, "[0, 1)")
        check_weight(accuracy_drop=accuracy_drop)
        self.threshold, self.accuracy_drop, self.experts = threshold, accuracy_drop, experts

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has nothing to mask."""
        if not self._units(model):
            raise ConfigError(
                f"model: {type(model).__name__} has no norm with a scale for each channel that could be masked"
            )

    def count(self, images: int, num_classes: int) -> int:
        """Return the number of training images that the defender holds.

        Args:
            images: Number of training images.
            num_classes: Number of classes.

        Raises:
            ConfigError: It is less than the number of classes, or a single image, which has no batch statistics.
        """
        count = super().count(images, num_classes)
        if count < FEWEST_IMAGES:
            raise ConfigError(
                f"clean_fraction: {self.clean_fraction} of {images} images is {count}; expected at least "
                f"{FEWEST_IMAGES}, to have batch statistics"
            )
        return count

    @abstractmethod
    def learn_masks(self, task: DefenseTask, units: Sequence[Units]) -> tuple[list[Tensor], dict[str, float]]:
        """Learn the masks.

        Args:
            task: The task; its model must not be changed.
            units: The units of the model.

        Returns:
            The mask of each of `units`, (n,) in [0, 1]; and details for the record.
        """

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Learn the masks, and with `accuracy_drop` measure the accuracy at each threshold.

        This is an upper bound, since the thresholds above the chosen one are not all tried.
        """
        tried = 0 if self.accuracy_drop is None else 1 + len(LADDER)
        return Cost(trained=self.trained_images(held), predicted=tried * held)

    @abstractmethod
    def trained_images(self, held: int) -> int:
        """Return how many images `learn_masks` passes forward and backward at most, counted once for each pass.

        Args:
            held: Number of images that the defender holds.
        """

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Learn the masks, and prune.

        Raises:
            ConfigError: The masks are not finite.
        """
        units = self._units(task.model)
        learned, details = self.learn_masks(task, units)
        masks = [(each, mask.detach().float().cpu()) for each, mask in zip(units, learned, strict=True)]
        if not all(mask.isfinite().all() for _, mask in masks):
            value = getattr(self, self.strength)
            raise ConfigError(f"{self.strength}: the masks are not finite with {value}; lower it")
        threshold: float | None = self.threshold
        found: dict[str, Any] = dict(details)
        if self.accuracy_drop is not None:
            threshold, accuracies = highest_threshold(task, masks, self.accuracy_drop)
            found["accuracy"] = {f"{step:g}": value for step, value in accuracies.items()}
        if threshold is not None:
            prune_low(task.model, masks, threshold)
        return DefenseResult("pruned", task.model, tuple(self._judge(masks, threshold, found)))

    def _units(self, model: nn.Module) -> list[Units]:
        units = norm_units(model)
        if treats_experts(model, self.experts):
            units += [*expert_units(model), *gate_units(model)]
        return units

    def _judge(
        self, masks: Masks, threshold: float | None, details: Mapping[str, Any]
    ) -> Iterator[Judgement]:
        """Yield the judgement about the model, and in the MoE form the one about its experts."""
        low = {
            (units.kind, units.layer): [] if threshold is None else low_units(units, mask, threshold)
            for units, mask in masks
        }
        rule = "with no threshold does the clean accuracy stay, so that nothing is pruned"
        if threshold is not None:
            rule = f"what has a mask of at most {threshold:g} is pruned"
        norms = {units.layer: mask for units, mask in masks if units.kind == "channel"}
        pruned_channels = {layer: low["channel", layer] for layer in norms if low["channel", layer]}
        yield Judgement(
            "model",
            f"{self.reason}: {rule}; the score of a norm is the lowest mask of its channels",
            scores={layer: mask.min().item() for layer, mask in norms.items()},
            threshold=threshold,
            suspicious=list(pruned_channels),
            details={
                "pruned": pruned_channels,
                "channels": {layer: len(mask) for layer, mask in norms.items()},
                **details,
            },
        )
        scores: dict[str, dict[str, float]] = {"expert": {}, "gate": {}}
        pruned: dict[str, list[str]] = {"expert": [], "gate": []}
        for units, mask in masks:
            if units.kind != "channel":
                scores[units.kind] |= dict(zip(units.names, mask.tolist(), strict=True))
                pruned[units.kind] += [units.names[number] for number in low[units.kind, units.layer]]
        if scores["expert"]:
            yield Judgement(
                "expert",
                f"{self.reason}: {rule}",
                scores=scores["expert"],
                threshold=threshold,
                suspicious=pruned["expert"],
                details={"gates": scores["gate"], "pruned_gates": pruned["gate"]},
            )


def low_units(units: Units, mask: Tensor, threshold: float) -> list[int]:
    """Return the indices of the units to prune: those with a low mask, but never all experts of a layer.

    Args:
        units: The units.
        mask: (n,).
        threshold: The highest mask that counts as low.
    """
    low = (mask <= threshold).nonzero().flatten().tolist()
    if units.kind == "expert" and len(low) == len(units):
        low.remove(int(mask.argmax()))
    return low


def prune_low(model: nn.Module, masks: Masks, threshold: float) -> None:
    """Prune all units with a mask of at most `threshold`, in place; see `low_units`."""
    for units, mask in masks:
        prune(model, units, low_units(units, mask, threshold))


@torch.no_grad()
def highest_threshold(
    task: DefenseTask, masks: Masks, drop: float
) -> tuple[float | None, dict[float, float]]:
    """Find the highest threshold at which the clean accuracy is kept.

    Args:
        task: The task; its model is restored afterwards.
        masks: The units and their masks.
        drop: How many percentage points of accuracy may be lost.

    Returns:
        The last threshold of `LADDER` before the first one at which more is lost, None if that is the lowest; and the
        accuracy in percent at each threshold that was tried.
    """
    state = task.model.state_dict()
    names = {name for units, _ in masks for name in units.rows}
    before = clean_accuracy(task)
    chosen: float | None = None
    accuracies: dict[float, float] = {}
    with restored(state[name] for name in names):
        for threshold in LADDER:
            prune_low(task.model, masks, threshold)
            accuracies[threshold] = clean_accuracy(task)
            if accuracies[threshold] < before - drop:
                break
            chosen = threshold
    return chosen, accuracies


class MaskedModel:
    """A model whose units are masked, without changing its weights.

    Args:
        model: The model.
        units: Its units.
        device: Device of the model.
        precision: "fp32" or "bf16".

    Attributes:
        masks: A leaf tensor for each of the units, (n,) float32, initially all ones.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Units], device: torch.device, precision: str
    ) -> None:
        self.model, self.units, self.device, self.precision = model, list(units), device, precision
        self.masks = [torch.ones(len(each), device=device, requires_grad=True) for each in units]

    def loss(
        self,
        split: Split,
        noise: Sequence[Tensor] | None = None,
        shifts: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the mean cross-entropy of images.

        Args:
            split: The images and labels.
            noise: Values that are added to the mask of each of the units, (n,).
            shifts: Factors of the shifts of norms, by the norm's name.
        """
        factors = self.masks if noise is None else [m + n for m, n in zip(self.masks, noise, strict=True)]
        tensors = masked_tensors(self.model, list(zip(self.units, factors, strict=True)), shifts)
        images = as_input(split.images)
        with in_precision(self.device, self.precision):
            logits = functional_call(self.model, tensors, (images,))
        return F.cross_entropy(logits.float(), split.labels)

    def backward(self, loss: Tensor) -> None:
        """Set the gradients of the masks; 0 if there is none, as for gates that choose one expert for each token."""
        gradients = torch.autograd.grad(loss, self.masks, materialize_grads=True)
        for mask, gradient in zip(self.masks, gradients, strict=True):
            mask.grad = gradient

    @torch.no_grad()
    def clip(self) -> None:
        """Clip the masks to [0, 1], and those of experts to [0.001, 1]; see `LEAST_EXPERT`."""
        for units, mask in zip(self.units, self.masks, strict=True):
            mask.clamp_(LEAST_EXPERT if units.kind == "expert" else 0, 1)


def shuffled_batches(split: Split, size: int, seed: int) -> Iterator[Split]:
    """Yield batches indefinitely: all images in a new random order in each epoch.

    Args:
        split: The images, at least two.
        size: Images in a batch, at least two. The last batch of an epoch may be smaller. If it would have a single
            image, this image is not used in the epoch, since it has no batch statistics.
        seed: Seed of the orders.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(split) < FEWEST_IMAGES:
        raise ValueError(f"shuffled_batches: expected at least {FEWEST_IMAGES} images, got {len(split)}")
    epoch = 0
    while True:
        order = torch.randperm(len(split), generator=generator(seed, "masks", epoch))
        for indices in order.split(size)[: steps_of_epoch(len(split), size)]:
            place = indices.to(split.labels.device)
            yield Split(split.images[place], split.labels[place])
        epoch += 1


def steps_of_epoch(count: int, size: int) -> int:
    """Return the number of batches in an epoch of `shuffled_batches`, for `count` images in batches of `size`."""
    return count // size + (count % size > 1)


def images_of_steps(count: int, size: int, steps: int) -> int:
    """Return the number of images in the first `steps` batches of `shuffled_batches`; see `steps_of_epoch`."""
    epochs, left = divmod(steps, steps_of_epoch(count, size))
    used = count - (count % size == 1)
    return epochs * used + min(left * size, used)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block, batch norms normalise with the statistics of the batch; afterwards, buffers are restored."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    modes = [module.training for module in norms]
    with restored(buffer for module in norms for buffer in module.buffers()):
        try:
            for module in norms:
                module.train()
            yield
        finally:
            for module, training in zip(norms, modes, strict=True):
                module.train(training)
