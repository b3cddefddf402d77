"""Inversion of triggers: for each target of a goal, the smallest stamp that reaches it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.goals import Goal
from backdoorbench_moe.defenses.stamps import canvas_shape
from backdoorbench_moe.ops.seeding import generator

# Of the original code: the weight of the size at the start, and its factors up and down.
FIRST_WEIGHT, UP, DOWN = 1e-3, 2.0, 2**1.5
# Number of images of 32x32 that are stamped at a time by default: 20 targets with batches of 32.
PIXELS_AT_ONCE = 640 * 32 * 32
# The size has to fall by this share, or it counts as not improved.
IMPROVEMENT = 0.01


@dataclass(frozen=True)
class Search:
    """How triggers are searched for.

    Args:
        epochs: Most passes over the images for each target.
        batch_size: Number of images that one step stamps for each target.
        success: Share of what a stamp could bring to its target, in (0, 1), that it must bring there; see `Outcome`.
        patience: Number of epochs after which the weight of the size is changed; twice as many without a smaller
            stamp end the search.
        at_once: Number of targets whose stamps are searched for in one pass through the model; as many as stamp
            `PIXELS_AT_ONCE` pixels if None.
        seed: Seed of the start and of the order of the images.
    """

    epochs: int
    batch_size: int
    success: float
    patience: int
    at_once: int | None
    seed: int


@dataclass(frozen=True)
class Found:
    """The stamps that were found for K targets.

    Args:
        values: (K, 4, h, w), mask and pattern of the smallest stamp of each target that succeeds; if there is none, of
            the last one.
        sizes: Their sizes, the sums of the masks in pixels of the canvas; the size of the canvas if there is none.
        success: The share of what they could bring to the target that they do bring there.
        epochs: Number of passes over the images that each target took.
        failed: Whether no stamp of the target succeeded.
    """

    values: Tensor
    sizes: list[float]
    success: list[float]
    epochs: list[int]
    failed: list[bool]


@dataclass
class _Target:
    """The search for one target: its free variables, the weight of the size, and the best stamp so far."""

    number: int
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


def invert(goal: Goal, targets: Sequence[int], search: Search) -> Found:
    """Search for the smallest stamp of each target.

    Minimised is the loss of the goal plus a weight times the size of the stamp on the whole image. The weight starts at
    0.001; it is doubled after `patience` epochs with a share of successes of at least `success`, and divided by 2^1.5
    after as many below. The optimizer is Adam with a learning rate of 0.1 and betas of 0.5 and 0.9. A search ends after
    twice `patience` epochs in which the size has not fallen by 1%, once the weight has been changed in both directions.

    `at_once` targets share a pass through the model, with the same images. The optimizer works on every value by
    itself, so that this does not change what is found, except for the rounding.

    Departure from the paper's code: what is at the target without a stamp, such as the images of the class itself, is
    left out, since it needs no stamp, and the start is drawn from the seed of each target.

    Args:
        goal: What is searched for; its model is not changed.
        targets: The numbers of K targets of the goal.
        search: The options.

    Source:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV and its code.
    """
    images = goal.clean.images
    found = [_Target(number, _start(number, goal, search)) for number in targets]
    with frozen(goal.model):
        pixels = search.batch_size * images[0, 0].numel()
        at_once = search.at_once or max(1, PIXELS_AT_ONCE // pixels)
        for first in range(0, len(found), at_once):
            _search_group(goal, found[first : first + at_once], search)
        largest = float(math.prod(canvas_shape(images, goal.side)))
        last = to_values(torch.stack([each.free.detach() for each in found]))
        values = torch.stack(
            [v if each.best is None else each.best for each, v in zip(found, last, strict=True)]
        )
        success = [
            measure_success(goal, stamp, each.number, search)
            for each, stamp in zip(found, values, strict=True)
        ]
    failed = [each.best is None for each in found]
    sizes = [largest if each.best is None else each.size for each in found]
    return Found(values, sizes, success, [each.epochs for each in found], failed)


def to_values(free: Tensor) -> Tensor:
    """Map free variables (K, 4, h, w), any real numbers, to masks and patterns in [0, 1] by tanh."""
    return (free.tanh() + 1) / 2


def sizes_of(values: Tensor) -> Tensor:
    """Return the L1 norms of the masks (K,), in pixels."""
    return values[:, 0].sum((1, 2))


@torch.no_grad()
def measure_success(goal: Goal, values: Tensor, target: int, search: Search) -> float:
    """Return the share of what one stamp (4, h, w) could bring to a target that it does bring there."""
    hits, count = 0.0, 0.0
    for rows in goal.rows(target).split(search.batch_size):
        outcome = goal.outcome(goal.stamp(rows, values.unsqueeze(0)), rows, [target])
        hits, count = hits + outcome.hits.item(), count + outcome.counts.item()
    return hits / max(1, count)


def _start(number: int, goal: Goal, search: Search) -> Tensor:
    """Draw the free variables of a target, (4, h, w), from which the search starts."""
    shape = 4, *canvas_shape(goal.clean.images, goal.side)
    drawn = torch.randn(*shape, generator=generator(search.seed, "inversion", number))
    return drawn.to(goal.clean.images.device).requires_grad_()


def _search_group(goal: Goal, group: list[_Target], search: Search) -> None:
    """Search for the stamps of some targets at once; those that are done no longer take part."""
    optimizer = torch.optim.Adam([each.free for each in group], lr=0.1, betas=(0.5, 0.9))
    for epoch in range(search.epochs):
        active = [each for each in group if not each.done]
        if not active:
            break
        order = torch.randperm(len(goal.clean), generator=generator(search.seed, "inversion order", epoch))
        hits, counts = _run_epoch(goal, active, order, optimizer, search)
        values = to_values(torch.stack([each.free.detach() for each in active]))
        rows = zip(active, values, sizes_of(values).tolist(), hits, counts, strict=True)
        for each, value, size, hit, count in rows:
            each.update(value, size, hit / max(1, count), search)


def _run_epoch(
    goal: Goal, active: list[_Target], order: Tensor, optimizer: torch.optim.Optimizer, search: Search
) -> tuple[list[float], list[float]]:
    """Take the steps of one epoch; return the sums of `Outcome.hits` and `Outcome.counts`, for each target."""
    images = goal.clean.images
    targets = [each.number for each in active]
    weights = torch.tensor([each.weight for each in active], device=images.device)
    area = images[0, 0].numel()
    # Numbers of images are whole, and exact in float64.
    hits = torch.zeros(len(active), dtype=torch.float64, device=images.device)
    counts = torch.zeros_like(hits)
    for rows in order.to(images.device).split(search.batch_size):
        values = to_values(torch.stack([each.free for each in active]))
        outcome = goal.outcome(goal.stamp(rows, values), rows, targets)
        # The size on the whole image, so that a weight means the same for tiles of any side.
        sizes = sizes_of(values) * (area / values[0, 0].numel())
        optimizer.zero_grad(set_to_none=True)
        (outcome.losses + weights * sizes).sum().backward()
        optimizer.step()
        hits += outcome.hits
        counts += outcome.counts
    optimizer.zero_grad(set_to_none=True)
    return hits.tolist(), counts.tolist()


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
