"""The trigger of label-consistent backdoors (Turner et al., 2019): corners on images that are hard to learn."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.ops.descent import signed_descent
from backdoorbench_moe.ops.images import batch_size_for
from backdoorbench_moe.triggers.optimised import OptimisedTrigger, Surrogate, SurrogateTask, check_at_least

# Side of a corner in pixels; on canvases of less than 12 pixels, such as tiles, it is a quarter of their side.
CORNER, SHARE = 3, 4
# Images that are perturbed at a time, fewer if they are large.
BATCH = 250


class LabelConsistent(OptimisedTrigger):
    """Paint a small chessboard into each corner; in training, on images with an adversarial perturbation.

    In training, each stamped image is perturbed (PGD) so that a clean model, the surrogate, no longer predicts its true
    class; then the corners are painted. To learn such an image, the victim must use the corners. The test form only
    paints the corners. The attack is intended for clean labels (`--labels clean`).

    The corners have 3x3 pixels; on canvases below 12 pixels, such as tiles, their side is a quarter of the canvas.
    Opposite corners are equal, and neighbouring ones have black and white exchanged. With the applicator "patch", every
    tile has its own corners; the perturbation is computed for the full image. Training images that were not perturbed,
    because they are in neither the poison nor the cover group, only get the corners.

    Departures: the paper perturbs images against an adversarially trained model; here, the surrogate is trained without
    adversarial examples. The corners of the paper's code are mirror images of each other, and have one white pixel less
    than a chessboard. The paper also studies corners with a reduced amplitude; here, they are always opaque.

    Args:
        surrogate: See `OptimisedTrigger`.
        strength: L-infinity bound of the perturbation, in [1/255, 127/255]. It is rounded down to a multiple of 1/255,
            as images are stored with 8 bits.
        step: Change of a pixel in a step of PGD, above 0.
        steps: Number of steps of PGD, at least 1.
        seed: Not used, as nothing is random.

    Raises:
        ConfigError: An option is out of range.

    Source:
        Turner, Tsipras and Madry, "Label-Consistent Backdoor Attacks", 2019, §4.2 and §5, and its code
        MadryLab/label-consistent-backdoor-code.
    """

    tiny: ClassVar[Mapping[str, object]] = {"surrogate": "twin", "steps": 2}

    def __init__(
        self,
        *,
        surrogate: Surrogate,
        strength: float = 8 / 255,
        step: float = 1.5 / 255,
        steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(surrogate=surrogate, seed=seed)
        if not 1 / 255 <= strength <= 127 / 255:
            raise ConfigError.expected("label-consistent: strength", "a number in [1/255, 127/255]", strength)
        if not step > 0:
            raise ConfigError.expected("label-consistent: step", "a number above 0", step)
        check_at_least("label-consistent", 1, steps=steps)
        self.strength, self.step, self.steps = strength, step, steps

    def stamp(self, images: Tensor) -> Tensor:
        """Paint the corners."""
        height, width = images.shape[-2:]
        size = min(CORNER, max(1, min(height, width) // SHARE))
        rows = torch.arange(size, device=images.device)
        white = (rows.unsqueeze(1) + rows) % 2 == 0
        stamped = images.clone()
        stamped[..., :size, :size] = white.to(images.dtype)
        stamped[..., height - size :, width - size :] = white.flip(0, 1).to(images.dtype)
        stamped[..., :size, width - size :] = (~white).flip(1).to(images.dtype)
        stamped[..., height - size :, :size] = (~white).flip(0).to(images.dtype)
        return stamped

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Add the perturbation of each image, and paint the corners.

        Raises:
            ShapeError: The perturbations were computed for canvases of another size.
        """
        return self.stamp(self._perturbed(images, places) if self.learned else images)

    def state_fault(self, state: Mapping[str, Tensor]) -> str | None:
        """Check the state: the perturbation of each canvas, in steps of 1/255, and its place, in ascending order."""
        places, levels = state.get("places"), state.get("levels")
        if places is None or levels is None or levels.ndim != 4 or places.shape != levels.shape[:1]:
            return "expected a state with tensors 'places' (n,) and 'levels' (n, C, h, w)"
        return None

    def passes(self, stamped: int) -> int:
        """Every stamped image in every step."""
        return self.steps * stamped

    def optimise(self, task: SurrogateTask) -> dict[str, Tensor]:
        """Perturb the stamped images, batch by batch."""
        found = [self._perturb(task, part) for part in _batches(task)]
        places, levels = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = places.argsort()
        return {"places": places[order], "levels": levels[order]}

    def assess(self, task: SurrogateTask) -> dict[str, float]:
        """Return the accuracy of the surrogate on the stamped images in the training form."""
        right = []
        for part in _batches(task):
            images, labels = task.take(part)
            canvases, places = task.cut(images, part.to(images.device))
            changed = self.training(canvases, places)
            right.append(task.model(task.stamp(images, partial(_exchange, changed))).argmax(1) == labels)
        return {"surrogate_accuracy": torch.cat(right).float().mean().item()}

    def _perturb(self, task: SurrogateTask, places: Tensor) -> tuple[Tensor, Tensor]:
        """Perturb one batch; return the places of the canvases, and the perturbation in steps of 1/255 (int8)."""
        images, labels = task.take(places)

        def loss(changed: Tensor, _: int) -> Tensor:
            return -F.cross_entropy(task.model(changed).float(), labels, reduction="sum")

        low, high = ((images + sign * self.strength).clamp(0, 1) for sign in (-1, 1))
        changed = signed_descent(loss, images, range(self.steps), step=self.step, low=low, high=high)
        # Rounded to the levels of an image file, without exceeding the strength.
        levels = ((changed - images) * 255).round()
        most = int(self.strength * 255 + 1e-4)
        places = places.to(images.device)
        clean, canvas_places = task.cut(images, places)
        new, _ = task.cut((images + levels.clamp(-most, most) / 255).clamp(0, 1), places)
        return canvas_places, ((new - clean) * 255).round().to(torch.int8)

    def _perturbed(self, images: Tensor, places: Tensor) -> Tensor:
        known = self._state["places"].to(images.device)
        levels = self._state["levels"].to(images.device)
        if not len(known):
            return images
        if levels.shape[1:] != images.shape[1:]:
            raise ShapeError(
                f"label-consistent: expected images {tuple(levels.shape[1:])}, which were perturbed, "
                f"got {tuple(images.shape[1:])}"
            )
        rows = torch.searchsorted(known, places.to(images.device)).clamp(max=len(known) - 1)
        found = (known[rows] == places.to(images.device)).view(-1, 1, 1, 1)
        return (images + found * levels[rows].to(images.dtype) / 255).clamp(0, 1)


def _batches(task: SurrogateTask) -> tuple[Tensor, ...]:
    """Return the places of the stamped images that are passed through the surrogate at a time."""
    return task.stamped.split(min(BATCH, batch_size_for(task.images)))


def _exchange(new: Tensor, canvases: Tensor) -> Tensor:
    """Return new canvases instead of those that an applicator passes."""
    return new
