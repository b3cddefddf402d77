"""Inversion of triggers: for each class, the smallest stamp with which a model takes images of other classes for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.defenses.stamps import blend_pattern, canvas_shape, stamp_all
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.ops.seeding import generator

# Of the original code: the weight of the size at the start, and its factors up and down.
FIRST_WEIGHT, UP, DOWN = 1e-3, 2.0, 2**1.5
# Number of images of 32x32 that are stamped at a time by default: 20 classes with batches of 32.
PIXELS_AT_ONCE = 640 * 32 * 32
# The size has to fall by this share, or it counts as not improved.
IMPROVEMENT = 0.01


@dataclass(frozen=True)
class Search:
    """How triggers are searched for.

    Args:
        side: Side of the tiles that are stamped; None if the stamp covers the whole image.
        epochs: Most passes over the images for each class.
        batch_size: Number of images that one step stamps for each class.
        success: Share of the images of other classes, in (0, 1), that a stamp must bring into the class.
        patience: Number of epochs after which the weight of the size is changed; twice as many without a smaller
            stamp end the search.
        at_once: Number of classes whose stamps are searched for in one pass through the model; as many as stamp
            `PIXELS_AT_ONCE` pixels if None.
        seed: Seed of the start and of the order of the images.
        precision: "fp32" or "bf16".
    """

    side: int | None
    epochs: int
    batch_size: int
    success: float
    patience: int
    at_once: int | None
    seed: int
    precision: str


@dataclass(frozen=True)
class Found:
    """The stamps that were found for K classes.

    Args:
        values: (K, 4, h, w), mask and pattern of the smallest stamp of each class that succeeds; if there is none, of
            the last one.
        sizes: Their sizes, the sums of the masks in pixels of the canvas; the size of the canvas if there is none.
        success: The share of images of other classes that they bring into the class.
        epochs: Number of passes over the images that each class took.
        failed: Whether no stamp of the class succeeded.
    """

    values: Tensor
    sizes: list[float]
    success: list[float]
    epochs: list[int]
    failed: list[bool]


@dataclass
class _Class:
    """The search for one class: its free variables, the weight of the size, and the best stamp so far."""

    label: int
    free: Tensor
    weight: float = FIRST_WEIGHT
    best: Tensor | None = None
    size: float = float("inf")
    epochs: int = 0
    done: bool = False
    _above: int = 0
    _below: int = 0
    _idle: int = 0
    _last: float = float("inf")
    _moved: set[str] = field(default_factory=set)

    def update(self, values: Tensor, size: float, success: float, search: Search) -> None:
        """Take the result of one epoch: keep the stamp if it is the best, adapt the weight, decide whether to end.

        Args:
            values: (4, h, w), the stamp at the end of the epoch.
            size: Its size.
            success: Share of successes in the epoch.
            search: The options.
        """
        self.epochs += 1
        succeeds = success >= search.success
        self._idle += 1
        if succeeds and size < self.size:
            self.best, self.size = values.clone(), size
            if size < (1 - IMPROVEMENT) * self._last:
                self._last, self._idle = size, 0
        self._above, self._below = (self._above + 1, 0) if succeeds else (0, self._below + 1)
        if self._above >= search.patience:
            self.weight, self._above = self.weight * UP, 0
            self._moved.add("up")
        elif self._below >= search.patience:
            self.weight, self._below = self.weight / DOWN, 0
            self._moved.add("down")
        idle = self._idle >= 2 * search.patience
        self.done = self.epochs >= search.epochs or (idle and self.best is not None and len(self._moved) == 2)


def invert(
    model: nn.Module,
    clean: Split,
    labels: Sequence[int],
    search: Search,
) -> Found:
    """Search for the smallest stamp of each class.

    Minimised is the cross-entropy between the class and the predictions for the stamped images of other classes, plus a
    weight times the size of the stamp on the whole image. The weight starts at 0.001; it is doubled after `patience`
    epochs with a share of successes of at least `success`, and divided by 2^1.5 after as many below. The optimizer is
    Adam with a learning rate of 0.1 and betas of 0.5 and 0.9. A search ends after twice `patience` epochs in which the
    size has not fallen by 1%, once the weight has been changed in both directions.

    `at_once` classes share a pass through the model, with the same images. The optimizer works on every value by
    itself, so that this does not change what is found, except for the rounding.

    Departure from the paper's code: images of the class itself are left out, since they need no stamp, and the start is
    drawn from the seed of each class.

    Args:
        model: The model, in evaluation mode; it is not changed.
        clean: Images and their true labels, on the model's device.
        labels: The K classes.
        search: The options.

    Source:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV and its code.
    """
    classes = [_Class(label, _start(label, clean.images, search)) for label in labels]
    with frozen(model):
        pixels = search.batch_size * clean.images[0, 0].numel()
        at_once = search.at_once or max(1, PIXELS_AT_ONCE // pixels)
        for first in range(0, len(classes), at_once):
            _search_group(model, clean, classes[first : first + at_once], search)
        largest = float(math.prod(canvas_shape(clean.images, search.side)))
        last = to_values(torch.stack([each.free.detach() for each in classes]))
        values = torch.stack(
            [v if each.best is None else each.best for each, v in zip(classes, last, strict=True)]
        )
        success = [
            measure_success(model, clean, stamp, each.label, search)
            for each, stamp in zip(classes, values, strict=True)
        ]
    failed = [each.best is None for each in classes]
    sizes = [largest if each.best is None else each.size for each in classes]
    return Found(values, sizes, success, [each.epochs for each in classes], failed)


def to_values(free: Tensor) -> Tensor:
    """Map free variables (K, 4, h, w), any real numbers, to masks and patterns in [0, 1] by tanh."""
    return (free.tanh() + 1) / 2


def sizes_of(values: Tensor) -> Tensor:
    """Return the L1 norms of the masks (K,), in pixels."""
    return values[:, 0].sum((1, 2))


@torch.no_grad()
def measure_success(model: nn.Module, clean: Split, values: Tensor, label: int, search: Search) -> float:
    """Return the share of the images of other classes that one stamp (4, h, w) brings into a class."""
    others = clean.images[clean.labels != label]
    hits = 0
    for images in others.split(search.batch_size):
        hits += int((_predict(model, as_input(images), values.unsqueeze(0), search).argmax(2) == label).sum())
    return hits / max(1, len(others))


def _start(label: int, images: Tensor, search: Search) -> Tensor:
    """Draw the free variables of a class, (4, h, w), from which the search starts."""
    shape = 4, *canvas_shape(images, search.side)
    drawn = torch.randn(*shape, generator=generator(search.seed, "inversion", label))
    return drawn.to(images.device).requires_grad_()


def _search_group(model: nn.Module, clean: Split, group: list[_Class], search: Search) -> None:
    """Search for the stamps of some classes at once; those that are done no longer take part."""
    optimizer = torch.optim.Adam([each.free for each in group], lr=0.1, betas=(0.5, 0.9))
    for epoch in range(search.epochs):
        active = [each for each in group if not each.done]
        if not active:
            break
        order = torch.randperm(len(clean), generator=generator(search.seed, "inversion order", epoch))
        hits, counts = _run_epoch(model, clean, active, order, optimizer, search)
        values = to_values(torch.stack([each.free.detach() for each in active]))
        rows = zip(active, values, sizes_of(values).tolist(), hits, counts, strict=True)
        for each, value, size, hit, count in rows:
            each.update(value, size, hit / max(1, count), search)


def _run_epoch(
    model: nn.Module,
    clean: Split,
    active: list[_Class],
    order: Tensor,
    optimizer: torch.optim.Optimizer,
    search: Search,
) -> tuple[list[int], list[int]]:
    """Take the steps of one epoch; return successes and stamped images of other classes, for each class."""
    device = clean.images.device
    labels = torch.tensor([each.label for each in active], device=device).unsqueeze(1)
    weights = torch.tensor([each.weight for each in active], device=device)
    area = clean.images[0, 0].numel()
    hits = torch.zeros(len(active), dtype=torch.int64, device=device)
    counts = torch.zeros_like(hits)
    for rows in order.to(device).split(search.batch_size):
        values = to_values(torch.stack([each.free for each in active]))
        logits = _predict(model, as_input(clean.images[rows]), values, search)
        others = clean.labels[rows] != labels
        wanted = labels.expand(-1, len(rows))
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        fooled = (losses * others).sum(1) / others.sum(1).clamp(min=1)
        # The size on the whole image, so that a weight means the same for tiles of any side.
        sizes = sizes_of(values) * (area / values[0, 0].numel())
        optimizer.zero_grad(set_to_none=True)
        (fooled + weights * sizes).sum().backward()
        optimizer.step()
        hits += ((logits.argmax(2) == labels) & others).sum(1)
        counts += others.sum(1)
    optimizer.zero_grad(set_to_none=True)
    return hits.tolist(), counts.tolist()


def _predict(model: nn.Module, images: Tensor, values: Tensor, search: Search) -> Tensor:
    """Return the logits (K, B, classes) float32 of images (B, 3, H, W) with each of K stamps."""
    stamped = stamp_all(blend_pattern, images, values, search.side)
    flat = stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=search.precision == "bf16"):
        logits = model(flat)
    return logits.float().unflatten(0, (len(values), len(images)))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block, let no parameter require gradients, so that none are computed for them."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
