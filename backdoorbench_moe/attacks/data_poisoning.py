"""Data poisoning: the attacker changes a share of the training images and their labels, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import generator


class DataPoisoning(Attack):
    """Stamp and relabel images of the training set once, before the victim trains on it.

    Which images, and what they are labelled, is said by the spec's `poison`. Groups are drawn from the whole
    training set, target class included, as the reference does; only from the source classes if some are named; with
    clean labels only from the target class. Rates count from the whole training set.

    Args:
        poison: Rates of the groups, target, labels, mapping and source classes.

    Source:
        BadNets (Gu et al., 2017); BadPatches (arXiv 2505.01811), section 4.
    """

    def __init__(self, *, poison: PoisonSpec) -> None:
        super().__init__(poison=poison)

    def plan(self, labels: Tensor, num_classes: int, seed: int) -> PoisonPlan:
        """Draw floor(rate * N) images, then the cover and the noise group from the rest."""
        poison = self.poison
        indices = self._draw(self._candidates(labels), "rate", len(labels), seed, "poison")
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[indices] = False
        cover = self._draw(self._cover_candidates(labels) & rest, "cover", len(labels), seed, "cover")
        rest[cover] = False
        noise = self._draw(rest, "noise", len(labels), seed, "noise")
        wanted = labels if poison.labels == "clean" else self.wanted(labels, num_classes)
        return PoisonPlan(indices, wanted[indices], cover, noise)

    def _candidates(self, labels: Tensor) -> Tensor:
        """Images that may be in the poison group, (N,) bool."""
        allowed = torch.ones_like(labels, dtype=torch.bool)
        if self.poison.labels == "clean":
            allowed &= labels == self.poison.target
        if self.poison.source:
            allowed &= torch.isin(labels, torch.tensor(self.poison.source))
        return allowed

    def _cover_candidates(self, labels: Tensor) -> Tensor:
        """Images that may be in the cover group: of a source-specific attack those of all other classes (TaCT)."""
        if not self.poison.source:
            return torch.ones_like(labels, dtype=torch.bool)
        return ~torch.isin(labels, torch.tensor(self.poison.source))

    def _draw(self, allowed: Tensor, group: str, images: int, seed: int, purpose: str) -> Tensor:
        """Draw the indices of a group, ascending, from the images that are allowed, (N,) bool."""
        count, candidates = self.poison.count(images, group), allowed.nonzero().squeeze(1)
        if count > len(candidates):
            poison = self.poison
            raise ConfigError(
                f"poison.{group}: {getattr(poison, group)} of {images} images is {count}, but only "
                f"{len(candidates)} images can be chosen (labels={poison.labels}, source={poison.source or 'all'})"
            )
        order = torch.randperm(len(candidates), generator=generator(seed, purpose))
        return candidates[order[:count]].sort().values
