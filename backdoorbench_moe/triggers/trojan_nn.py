"""The trigger of TrojanNN (Liu et al., NDSS 2018): a pattern that maximises the activation of selected neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.structure import WithFeatures
from backdoorbench_moe.ops.descent import signed_descent
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.triggers.mark import LearnedMark
from backdoorbench_moe.triggers.optimised import Surrogate, SurrogateTask, check_at_least


class TrojanNN(LearnedMark):
    """Overwrite a small square with a pattern that maximises the activation of neurons of a clean model.

    The neurons are the features, the inputs of the last layer, with the largest sum of absolute weights in that layer.
    The pattern starts as noise, and each pixel may change by at most `strength`. With the applicator "patch", every
    tile contains the square.

    Departures: in the paper, the attacker tunes the surrogate itself on data that are reconstructed from it, and hands
    it over; here, the victim trains on poisoned data. The mean activation is maximised on training images by signed
    gradient steps; the paper moves the activations to target values, on one blank image. The number of steps is `steps`
    instead of 1000.

    Args:
        surrogate: See `OptimisedTrigger`. Its model must have features before a linear head.
        size: Side of the square in pixels, at least 1.
        neurons: Number of neurons, at least 1, at most the number of features.
        strength: Largest change of a pixel from the initial pattern, in (0, 1].
        step: Change of a pixel in a step, above 0.
        steps: Steps of the optimisation, at least 1.
        batch_size: Images in a step, at least 1.
        seed: Seed of the initial pattern and of the optimisation.

    Raises:
        ConfigError: An option is out of range; or, in a run, the surrogate does not have features, or too few.

    Source:
        Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018, §4.1; `strength` and `step` are those of later
        toolboxes.
    """

    tiny: ClassVar[Mapping[str, object]] = {"surrogate": "twin", "steps": 3, "batch_size": 8}

    def __init__(
        self,
        *,
        surrogate: Surrogate,
        size: int = 3,
        neurons: int = 2,
        strength: float = 0.3,
        step: float = 0.1,
        steps: int = 200,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__("trojan-nn", size=size, surrogate=surrogate, seed=seed)
        check_interval("trojan-nn: strength", strength, "(0, 1]")
        if not step > 0:
            raise ConfigError.expected("trojan-nn: step", "a number above 0", step)
        check_at_least("trojan-nn", 1, neurons=neurons, steps=steps, batch_size=batch_size)
        self.neurons, self.strength, self.step = neurons, strength, step
        self.steps, self.batch_size = steps, batch_size

    def passes(self, stamped: int) -> int:
        """The images of all batches."""
        return self.steps * self.batch_size

    def check(self, task: SurrogateTask) -> None:
        """Check that the model has at least `neurons` features."""
        if not isinstance(task.model, WithFeatures):
            raise ConfigError.expected(
                "trigger.surrogate",
                "a model with extract_features and classify, for the trigger 'trojan-nn'",
                type(task.model).__name__,
            )
        with torch.no_grad():
            features = task.model.extract_features(task.take(torch.arange(1))[0]).shape[1]
        if self.neurons > features:
            raise ConfigError.expected(
                "trojan-nn: neurons", f"at most {features}, the features", self.neurons
            )

    def optimise(self, task: SurrogateTask) -> dict[str, Tensor]:
        """Raise the mean activation of the neurons on training images."""
        neurons = self._neurons(task)

        def loss(pattern: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return -self._activation(task, batch[0], pattern, neurons)

        start = self.pattern.to(task.images.device)
        batches = task.batches(torch.arange(len(task.images)), self.batch_size, self.steps, self.seed)
        low, high = ((start + sign * self.strength).clamp(0, 1) for sign in (-1, 1))
        return {"pattern": signed_descent(loss, start, batches, step=self.step, low=low, high=high)}

    def assess(self, task: SurrogateTask) -> dict[str, float]:
        """Return the mean activation of the neurons."""
        images, _ = task.sample(self.seed)
        return {"activation": self._activation(task, images, self.pattern, self._neurons(task)).item()}

    def _activation(self, task: SurrogateTask, images: Tensor, pattern: Tensor, neurons: Tensor) -> Tensor:
        assert isinstance(task.model, WithFeatures)
        stamped = task.stamp(images, lambda canvases: self.paste(canvases, pattern))
        return task.model.extract_features(stamped).float()[:, neurons].mean()

    def _neurons(self, task: SurrogateTask) -> Tensor:
        """Return the indices of the features with the largest weights in the last layer, (neurons,) int64."""
        assert isinstance(task.model, WithFeatures)
        with torch.no_grad():
            features = task.model.extract_features(task.take(torch.arange(1))[0])
            # The weights of any linear layer are the changes of its output if an input is raised by one.
            units = torch.eye(features.shape[1], device=features.device, dtype=features.dtype)
            weights = task.model.classify(units) - task.model.classify(torch.zeros_like(units))
        return weights.abs().sum(1).sort(descending=True, stable=True).indices[: self.neurons]
