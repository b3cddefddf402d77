"""Labelled images or texts, and functions that process images in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.ops.answers import is_text
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.ops.stored_images import StoredImages, empty_like

# 512 images of 32x32 are 6 MB, which fit into the cache; 4096 at a time took twice as long.
CHUNK_VALUES = 512 * 3 * 32 * 32
# Images that are passed through a model at a time, fewer if they are larger than 64x64; for texts, the number of
# tokens, each of which has logits for the full vocabulary.
BATCH, BATCH_PIXELS, BATCH_TOKENS = 500, 500 * 64 * 64, 8192
# Weights of red, green and blue in grey (ITU-R BT.601), as in Pillow, torchvision and kornia.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Split:
    """Images with their labels, or texts with their answers.

    Attributes:
        images: (N, 3, H, W) uint8; `StoredImages` if they exceed the memory limit. For texts, the token ids (N, T)
            int64: query, answer and padding.
        labels: (N,) int64, class numbers from 0. For texts, (N, T) int64: the token that each position should emit, see
            `ops.answers`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def noun(self) -> str:
        """The noun for messages: "image" or "text"."""
        return "text" if is_text(self.images) else "image"

    def copy(self) -> Split:
        """Return a copy that does not share memory."""
        return Split(self.images.clone(), self.labels.clone())

    def take(self, rows: Tensor) -> Split:
        """Return the images at some indices, rows (n,) int64, in this order."""
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


def as_input(images: Tensor) -> Tensor:
    """Return the input of a model: (B, C, H, W) uint8 images as float32 in [0, 1], channels last; token ids as is."""
    if is_text(images):
        return images
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def batch_size_for(inputs: Tensor) -> int:
    """Return how many of the images (N, C, H, W), or texts (N, T), are passed through a model at a time."""
    if is_text(inputs):
        return max(1, BATCH_TOKENS // inputs.shape[1])
    return max(1, min(BATCH, BATCH_PIXELS // (inputs.shape[-2] * inputs.shape[-1])))


def batches(split: Split) -> Iterator[Split]:
    """Yield a split in parts that can be passed through a model at a time, in order."""
    size = batch_size_for(split.images)
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        yield Split(images, labels)


def change_images(images: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Change images as floats, in chunks on their device, and round the results to 8 bits once.

    Args:
        images: (N, C, H, W) uint8, on any device; they are not written to.
        change: Function of a chunk of the images, (B, C, H, W) float32 in [0, 1], and its slice of `images`. It returns
            the changed chunk, of the same shape.

    Returns:
        (N, C, H, W) uint8, on the device of `images`; for `StoredImages` that exceed the memory limit, stored images in
        a temporary file.
    """
    size = max(1, CHUNK_VALUES // max(1, images[:1].numel()))
    out = empty_like(images)
    # Without images, `split` yields one empty chunk.
    for start, chunk in zip(range(0, len(images), size), images.split(size), strict=False):
        part = slice(start, start + size)
        out[part] = change(chunk.float().div_(255), part).mul(255).round_().clamp_(0, 255)
    return out if isinstance(out, Tensor) else StoredImages([out.rows], device=images.device)


def concatenate(splits: Sequence[Split]) -> Split:
    """Return the images of several splits, one after the other."""
    return Split(torch.cat([each.images for each in splits]), torch.cat([each.labels for each in splits]))


def content_order(split: Split) -> Tensor:
    """Return an order of labelled images that depends only on their contents, not on their original order.

    They are sorted by a hash of pixels and label, a sum modulo 2**64 with a fixed random weight for each pixel.

    Returns:
        (N,) int64 indices, on the device of the labels. Equal images with equal labels keep their original order.
    """
    pixels = split.images[:1].numel()
    draws = generator(0, "content")
    weights = torch.randint(-(2**63), 2**63 - 1, (pixels + 1,), generator=draws).to(split.labels.device)
    size = max(1, CHUNK_VALUES // max(1, pixels))
    hashes = [(chunk.flatten(1).long() * weights[:-1]).sum(1) for chunk in split.images.split(size)]
    return (torch.cat(hashes) + split.labels * weights[-1]).argsort(stable=True)


def draw_images(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw images class by class: one image of each class, then a second one of each, and so on.

    Args:
        labels: (N,) int64, classes of the images to draw from.
        count: Number of images to draw, at most N.
        seed: The seed. With the same seed, a smaller draw is a prefix of a larger one.

    Returns:
        (count,) int64 indices into `labels`.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "preview"))
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    # The rank of each image among those of its class.
    ranks = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[ranks.argsort(stable=True)[:count]]
