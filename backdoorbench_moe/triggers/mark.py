"""A learned square of pixels in the lower right corner of the canvas."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.triggers.optimised import OptimisedTrigger, Surrogate, check_at_least, pattern_fault


class LearnedMark(OptimisedTrigger):
    """Base class of triggers that overwrite a square in the lower right corner with a pattern that is optimised.

    Args:
        name: Name of the trigger, for error messages.
        size: Side of the square in pixels, at least 1, at most the side of the image or tile.
        surrogate: See `OptimisedTrigger`.
        seed: Seed of the initial pattern and of the optimisation.
    """

    def __init__(self, name: str, *, size: int, surrogate: Surrogate, seed: int) -> None:
        super().__init__(surrogate=surrogate, seed=seed)
        check_at_least(name, 1, size=size)
        self._name, self.size = name, size

    @property
    def pattern(self) -> Tensor:
        """The square, (1, 3, size, size) float32 in [0, 1]; before it is learned, uniform noise."""
        if self.learned:
            return self._state["pattern"]
        draw = generator(self.seed, "start")
        return torch.rand(1, 3, self.size, self.size, generator=draw, dtype=torch.float32)

    def stamp(self, images: Tensor) -> Tensor:
        """Overwrite the square. Raises ShapeError as `paste` does."""
        self._check_fits(images)
        return self.paste(images, self.pattern)

    def paste(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Overwrite the square with a pattern (1, 3, size, size); gradients flow to the pattern.

        Raises:
            ShapeError: The square does not fit into the images, or the images do not have 3 channels.
        """
        self._check_fits(images)
        height, width = images.shape[-2:]
        stamped = images.clone()
        stamped[..., height - self.size :, width - self.size :] = pattern.to(images.device, images.dtype)
        return stamped

    def _check_fits(self, images: Tensor) -> None:
        channels, height, width = images.shape[1:]
        if channels != 3 or min(height, width) < self.size:
            raise ShapeError(
                f"{self._name}: size: {self.size} needs canvases of 3 channels and at least {self.size}x{self.size} "
                f"pixels, got {channels} and {height}x{width}"
            )

    def state_fault(self, state: Mapping[str, Tensor]) -> str | None:
        """Check the state, which is the square."""
        fault = pattern_fault(state)
        if fault is None and state["pattern"].shape[-1] != self.size:
            fault = f"expected a pattern of side {self.size}, got {state['pattern'].shape[-1]}"
        return fault
