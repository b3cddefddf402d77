"""Triggers whose pattern is optimised on a surrogate: a clean model that the attacker has trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.triggers.learned import LearnedTrigger

# Any other value is the name of a model.
Surrogate = Literal["same", "twin"] | str
# Number of images that a trigger is assessed on.
ASSESSED = 256


@dataclass(frozen=True)
class SurrogateTask:
    """The resources of an attacker who optimises a trigger.

    Attributes:
        model: The surrogate, in evaluation mode, on the device of the images. Its parameters require no gradients.
        images: (N, 3, H, W) uint8, the clean training images.
        labels: (N,) int64, their true labels.
        stamped: (n,) int64, places in the training set of the images of the poison and cover groups, ascending.
        target: The target class; None if there is no single one, as in all-to-all attacks.
        stamp: The applicator: stamps images (B, 3, H, W) float in [0, 1] with any function of canvases.
        cut: Cuts such images, with their places (B,), into the canvases (B * n, 3, h, w) that the applicator passes to
            a trigger, with the places (B * n,) that the trigger's training form receives for them.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    stamped: Tensor
    target: int | None
    stamp: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
    cut: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def take(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at some places as model inputs, (B, 3, H, W) float, and their labels (B,)."""
        places = places.to(self.images.device)
        return as_input(self.images[places]), self.labels[places]

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width in pixels of the canvas, the image or a tile."""
        images, _ = self.take(torch.zeros(1, dtype=torch.int64))
        height, width = self.cut(images, torch.zeros(1, dtype=torch.int64, device=images.device))[0].shape[
            -2:
        ]
        return height, width

    def batches(self, allowed: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches of images and labels with replacement.

        Args:
            allowed: (m,) int64, the places to draw from.
            size: Images in a batch.
            steps: Number of batches.
            seed: Seed of the draws.
        """
        draws, allowed = generator(seed, "optimise"), allowed.cpu()
        for _ in range(steps):
            yield self.take(allowed[torch.randint(len(allowed), (size,), generator=draws)])

    def sample(self, seed: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw up to `ASSESSED` images, each at most once; see `batches`."""
        allowed = torch.arange(len(self.images)) if allowed is None else allowed.cpu()
        order = torch.randperm(len(allowed), generator=generator(seed, "assess"))
        return self.take(allowed[order[:ASSESSED]].sort().values)


class OptimisedTrigger(LearnedTrigger):
    """Base class of triggers that are optimised on a surrogate before the victim is trained.

    The surrogate is a separate run: the clean twin of the victim, or a model with another seed or architecture that is
    trained in the same way. It is trained once and shared by all attacks that use it. In a spec, the option `surrogate`
    of a trigger always has this meaning, and the graph of runs reads it.

    Subclasses implement `optimise`, `stamp`, `state_fault` and `passes`. Everything random comes from `seed`.

    Args:
        surrogate: The attacker's knowledge. "same": the model itself; the surrogate is the clean twin of the victim,
            with its seed. "twin": architecture and data; it is the clean twin with the next seed. The name of a model:
            the data only; it is a model of this architecture, trained with the victim's recipe and seed. Its options
            are those under "surrogate" in the spec; by default, those of the recipe.
        seed: Seed of the optimisation.

    Raises:
        ConfigError: `surrogate` is empty.
    """

    def __init__(self, *, surrogate: Surrogate, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not surrogate:
            raise ConfigError.expected("surrogate", "'same', 'twin' or the name of a model", surrogate)
        self.surrogate = surrogate

    def check(self, task: SurrogateTask) -> None:
        """Check, before anything is trained, that the trigger can be optimised. The model has random weights.

        Raises:
            ConfigError: The trigger cannot be optimised.
        """

    @abstractmethod
    def optimise(self, task: SurrogateTask) -> dict[str, Tensor]:
        """Optimise the trigger, and return its state (see `LearnedTrigger`).

        The same task gives the same state. Gradients are enabled.
        """

    def assess(self, task: SurrogateTask) -> dict[str, float]:
        """Return metrics of the trigger on the surrogate, for the record; by default, none.

        Called before and after the optimisation, with gradients disabled.
        """
        return {}

    @abstractmethod
    def passes(self, stamped: int) -> int:
        """Return the number of forward and backward passes of images through the surrogate, for time estimates.

        Args:
            stamped: Number of images in the poison and cover groups.
        """


def check_at_least(trigger: str, least: float, **options: float) -> None:
    """Raise ConfigError if an option of a trigger is below a number."""
    for name, value in options.items():
        if not value >= least:
            raise ConfigError.expected(f"{trigger}: {name}", f"a number of at least {least:g}", value)


def pattern_fault(state: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with a state that consists of one pattern of a canvas; None if it is valid."""
    pattern = state.get("pattern")
    if pattern is None or pattern.ndim != 4 or pattern.shape[:2] != (1, 3):
        return "expected a state with a tensor 'pattern' (1, 3, h, w)"
    return None
