"""Choosing, stamping and relabelling images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.config import PoisonSpec, class_number
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import generator

Stamp = Callable[[Tensor], Tensor]
# A pass works on 512 images of 32x32 at a time: 6 MB, which stay in the cache; 4096 took twice the time.
CHUNK_VALUES = 512 * 3 * 32 * 32


@dataclass(frozen=True)
class PoisonPlan:
    """indices: (n,) int64, poisoned training images, ascending. labels: (n,) int64, what they are called."""

    indices: Tensor
    labels: Tensor


def check_classes(spec: PoisonSpec, num_classes: int) -> None:
    """Check the target and the source classes against the data.

    Raises:
        ConfigError: One is not a class of the data or is still given by name, or the target is among the sources
            where poisoning would not change its images' label.
    """
    for name, labels in (("poison.target", (spec.target,)), ("poison.source", spec.source)):
        for label in labels:
            if class_number(name, label) >= num_classes:
                raise ConfigError.expected(name, f"a class in 0..{num_classes - 1}", label)
    if spec.mapping == "all-to-one" and spec.labels == "dirty" and spec.target in spec.source:
        raise ConfigError.expected(
            "poison.source", f"classes other than the target {spec.target}, whose label is kept", spec.source
        )


def poisoned_labels(labels: Tensor, spec: PoisonSpec, num_classes: int) -> Tensor:
    """What the attacker wants images with these (N,) labels to be called when triggered."""
    if spec.mapping == "all-to-all":
        return (labels + 1) % num_classes
    return torch.full_like(labels, class_number("poison.target", spec.target))


def plan_poison(labels: Tensor, spec: PoisonSpec, num_classes: int, seed: int) -> PoisonPlan:
    """Draw the training images to poison, once, from the run's seed.

    labels: (N,) int64 of the whole training set. floor(rate * N) images are drawn from all of them, the
    target class included (as the reference does); from the source classes only where some are named;
    from the target class only for clean labels. Raises ConfigError if there are too few.
    """
    check_classes(spec, num_classes)
    labels = labels.cpu()
    count = spec.count(len(labels))
    allowed = torch.ones_like(labels, dtype=torch.bool)
    if spec.labels == "clean":
        allowed &= labels == spec.target
    if spec.source:
        allowed &= torch.isin(labels, torch.tensor(spec.source))
    candidates = allowed.nonzero().squeeze(1)
    if count > len(candidates):
        raise ConfigError(
            f"poison.rate: {spec.rate} of {len(labels)} images is {count}, "
            f"but only {len(candidates)} images can be poisoned (labels={spec.labels}, source={spec.source or 'all'})"
        )
    order = torch.randperm(len(candidates), generator=generator(seed, "poison"))
    indices = candidates[order[:count]].sort().values
    wanted = labels if spec.labels == "clean" else poisoned_labels(labels, spec, num_classes)
    return PoisonPlan(indices, wanted[indices])


@contextmanager
def poisoned(split: Split, plan: PoisonPlan, stamp: Stamp) -> Iterator[Split]:
    """Stamp and relabel the planned images of the split in place, and put them back at the end.

    In place, so that the images are held once: a copy of all of them would be a second data set in memory.
    """
    indices = plan.indices.to(split.images.device)
    clean = Split(split.images[indices], split.labels[indices])
    split.images[indices] = stamp_images(clean.images, stamp)
    split.labels[indices] = plan.labels.to(split.labels.device)
    try:
        yield split
    finally:
        split.images[indices], split.labels[indices] = clean.images, clean.labels


def stamp_images(images: Tensor, stamp: Stamp) -> Tensor:
    """Stamp (N, C, H, W) uint8 images on their device; rounded to uint8, as an attacker would save them."""
    size = max(1, CHUNK_VALUES // max(1, images[:1].numel()))
    out = torch.empty_like(images)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        out[part] = stamp(images[part].float().div_(255)).mul(255).round_().clamp_(0, 255)
    return out


def counted_for_asr(labels: Tensor, spec: PoisonSpec, num_classes: int) -> Tensor:
    """Which test images with these (N,) labels count for ASR, (N,) bool. Raises ConfigError if none does."""
    counted = poisoned_labels(labels, spec, num_classes) != labels
    if spec.source:
        counted &= torch.isin(labels, torch.tensor(spec.source, device=labels.device))
    if not counted.any():
        raise ConfigError(
            "poison.target: expected test images of other classes than the target "
            f"{spec.target} (source={list(spec.source) or 'all'}) to measure ASR on, found none"
        )
    return counted


def triggered_test(images: ImageSet, spec: PoisonSpec, stamp: Stamp) -> tuple[Split, Tensor]:
    """The test images that count for ASR, stamped, called what the attacker wants; and their true labels.

    Counted are images whose true class is not already the wanted one (and is a source class, where some
    are named). Returns the split and the (n,) true labels.
    """
    labels = images.test.labels
    wanted = poisoned_labels(labels, spec, images.num_classes)
    counted = counted_for_asr(labels, spec, images.num_classes)
    return Split(stamp_images(images.test.images[counted], stamp), wanted[counted]), labels[counted]
