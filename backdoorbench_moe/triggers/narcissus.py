"""The trigger of Narcissus (Zeng et al., CCS 2023): a perturbation toward the target class of a clean model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.ops.descent import adam_descent
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.triggers.optimised import (
    OptimisedTrigger,
    Surrogate,
    SurrogateTask,
    check_at_least,
    pattern_fault,
)


class Narcissus(OptimisedTrigger):
    """Add a universal perturbation that makes a clean surrogate model more confident in the target class.

    The perturbation minimises the surrogate's loss on training images of the target class with their own label. It is
    intended for clean labels (`--labels clean`), where a few poisoned images are enough. In the test form, it is
    multiplied by `amplify`. With the applicator "patch", one perturbation of the size of a tile is added to every tile.

    Departures: the paper trains the surrogate on other data and then tunes it on the target class; here, it is trained
    on the victim's data. The optimizer is Adam instead of RAdam, for `steps` batches instead of 1000 epochs.

    Args:
        surrogate: See `OptimisedTrigger`.
        strength: L-infinity bound of the perturbation in training, in (0, 1]; the default, 16/255, is the paper's.
        amplify: Factor of the perturbation in the test form, at least 1; the default is the paper's.
        steps: Steps of the optimisation, at least 1.
        batch_size: Images in a step, at least 1.
        lr: Learning rate, above 0.
        seed: Seed of the optimisation.

    Raises:
        ConfigError: An option is out of range; or, in a run, there is no single target class or it has no image.

    Source:
        Zeng et al., "Narcissus: A Practical Clean-Label Backdoor Attack with Limited Information", CCS 2023, §4.
    """

    tiny: ClassVar[Mapping[str, object]] = {"surrogate": "twin", "steps": 3, "batch_size": 8}

    def __init__(
        self,
        *,
        surrogate: Surrogate,
        strength: float = 16 / 255,
        amplify: float = 3.0,
        steps: int = 200,
        batch_size: int = 64,
        lr: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(surrogate=surrogate, seed=seed)
        check_interval("narcissus: strength", strength, "(0, 1]")
        if not lr > 0:
            raise ConfigError.expected("narcissus: lr", "a number above 0", lr)
        check_at_least("narcissus", 1, amplify=amplify, steps=steps, batch_size=batch_size)
        self.strength, self.amplify = strength, amplify
        self.steps, self.batch_size, self.lr = steps, batch_size, lr

    def stamp(self, images: Tensor) -> Tensor:
        """Add the amplified perturbation."""
        return (images + self.amplify * self._perturbation(images)).clamp(0, 1)

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Add the perturbation."""
        return (images + self._perturbation(images)).clamp(0, 1)

    def state_fault(self, state: Mapping[str, Tensor]) -> str | None:
        """Check the state, which is the perturbation of a canvas."""
        return pattern_fault(state)

    def passes(self, stamped: int) -> int:
        """The images of all batches."""
        return self.steps * self.batch_size

    def check(self, task: SurrogateTask) -> None:
        """Check that there is a single target class with training images."""
        if task.target is None:
            raise ConfigError(
                "poison.mapping: the trigger 'narcissus' needs one target class, got all-to-all"
            )
        if not (task.labels == task.target).any():
            raise ConfigError(
                f"poison.target: the trigger 'narcissus' needs training images of class {task.target}, found none"
            )

    def optimise(self, task: SurrogateTask) -> dict[str, Tensor]:
        """Minimise the loss on images of the target class, starting from a zero perturbation."""

        def loss(pattern: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = batch
            stamped = task.stamp(images, lambda canvases: (canvases + pattern).clamp(0, 1))
            return F.cross_entropy(task.model(stamped).float(), labels)

        own, _ = self._places(task)
        batches = task.batches(own, self.batch_size, self.steps, self.seed)
        start = torch.zeros(1, 3, *task.canvas, dtype=torch.float32, device=task.images.device)
        bounds = {"low": -self.strength, "high": self.strength}
        return {"pattern": adam_descent(loss, start, batches, lr=self.lr, **bounds)}

    def assess(self, task: SurrogateTask) -> dict[str, float]:
        """Return the share of images of other classes, in the test form, that the surrogate predicts as the target."""
        images, _ = task.sample(self.seed, self._places(task)[1])
        called = task.model(task.stamp(images, self)).argmax(1) == task.target
        return {"surrogate_asr": called.float().mean().item()}

    def _places(self, task: SurrogateTask) -> tuple[Tensor, Tensor]:
        """Return the places of the images of the target class, and those of the others."""
        assert task.target is not None
        own = torch.eq(task.labels, task.target)
        return own.nonzero().squeeze(1), (~own).nonzero().squeeze(1)

    def _perturbation(self, images: Tensor) -> Tensor:
        """Return the perturbation for canvases of this size; before it is learned, uniform noise."""
        channels, height, width = images.shape[1:]
        if channels != 3:
            raise ShapeError(f"narcissus: expected images of 3 channels, got {channels}")
        if not self.learned:
            draw = generator(self.seed, "narcissus start", height, width)
            noise = torch.rand(1, 3, height, width, generator=draw, dtype=torch.float32)
            return (self.strength * (2 * noise - 1)).to(images.device, images.dtype)
        pattern = self._state["pattern"]
        if pattern.shape[-2:] != (height, width):
            pattern = F.interpolate(pattern, (height, width), mode="bilinear", antialias=True)
        return pattern.to(images.device, images.dtype)
