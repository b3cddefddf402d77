"""Data poisoning: the attacker changes some training images and their labels, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.config import PoisonSpec, class_number
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import generator


class DataPoisoning(Attack):
    """Stamp and relabel images of the training set once, before the victim trains on it.

    The poison group is drawn from the full training set, including the target class, as in the code of BadPatches. With
    source classes, it is drawn from these classes only; with clean labels, from the target class only. The cover group
    is drawn from the remaining images; with source classes, only from those of other classes. The noise group is drawn
    from the rest. All rates are shares of the full training set.

    Args:
        poison: Rates of the groups, target class, labels, mapping and source classes.

    Raises:
        ConfigError: In `plan`: a group has fewer candidates than images, or its rate is positive but gives no image;
            or, with clean labels, the poison group is the complete target class.

    Source:
        BadNets (Gu et al., 2017); BadPatches (arXiv 2505.01811), section 4; for source classes with a cover group,
        TaCT (Tang et al., "Demon in the Variant", USENIX Security 2021).
    """

    def __init__(self, *, poison: PoisonSpec) -> None:
        super().__init__(poison=poison)

    def plan(self, labels: Tensor, num_classes: int, seed: int) -> PoisonPlan:
        """Draw the poison group, floor(rate * N) images, and then the other groups from the rest."""
        poison = self.poison
        indices = self._draw(self._candidates(labels), "rate", len(labels), seed, "poison")
        self._check_clean_labels(labels, len(indices))
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[indices] = False
        cover = self._draw(self._cover_candidates(labels) & rest, "cover", len(labels), seed, "cover")
        rest[cover] = False
        noise = self._draw(rest, "noise", len(labels), seed, "noise")
        wanted = labels if poison.labels == "clean" else self.wanted(labels, num_classes)
        return PoisonPlan(indices, wanted[indices], cover, noise)

    def _check_clean_labels(self, labels: Tensor, poisoned: int) -> None:
        """Raise ConfigError if, with clean labels, all images of the target class would be stamped."""
        whole = int((labels == class_number("poison.target", self.poison.target)).sum())
        if self.poison.labels == "clean" and poisoned == whole == 1:
            raise ConfigError(
                f"poison.target: class {self.poison.target} has 1 training image; with poison.labels=clean, expected "
                "at least 2, as one of them must stay without the trigger"
            )
        if self.poison.labels == "clean" and poisoned == whole:
            raise ConfigError(
                f"poison.rate: {self.poison.rate} of {len(labels)} images is {poisoned}, which are all images of class "
                f"{self.poison.target}; with poison.labels=clean, the model would see no image of this class without "
                f"the trigger, so expected less than {whole / len(labels):g}"
            )

    def _candidates(self, labels: Tensor) -> Tensor:
        """Return which images may be in the poison group, (N,) bool."""
        allowed = torch.ones_like(labels, dtype=torch.bool)
        if self.poison.labels == "clean":
            allowed &= labels == self.poison.target
        if self.poison.source:
            allowed &= torch.isin(labels, torch.tensor(self.poison.source))
        return allowed

    def _cover_candidates(self, labels: Tensor) -> Tensor:
        """Return which images may be in the cover group, (N,) bool: with source classes, those of other classes."""
        if not self.poison.source:
            return torch.ones_like(labels, dtype=torch.bool)
        return ~torch.isin(labels, torch.tensor(self.poison.source))

    def _draw(self, allowed: Tensor, group: str, images: int, seed: int, purpose: str) -> Tensor:
        """Draw the images of a group.

        Args:
            allowed: (N,) bool, the images to draw from.
            group: The field of `PoisonSpec` that holds the rate of the group.
            images: Number N of training images.
            seed: The run's seed.
            purpose: Name of the draw. Draws with different names are independent.

        Returns:
            (n,) int64 indices in ascending order.
        """
        count, candidates = self.poison.count(images, group), allowed.nonzero().squeeze(1)
        if count > len(candidates):
            poison = self.poison
            raise ConfigError(
                f"poison.{group}: {getattr(poison, group)} of {images} images is {count}, but only "
                f"{len(candidates)} images can be chosen (labels={poison.labels}, source={poison.source or 'all'})"
            )
        order = torch.randperm(len(candidates), generator=generator(seed, purpose))
        return candidates[order[:count]].sort().values
