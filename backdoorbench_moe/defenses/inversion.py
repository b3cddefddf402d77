"""Trigger inversion: for each target of a goal, find the smallest stamp that reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backdoorbench_moe.defenses.goals import Goal
from backdoorbench_moe.defenses.stamps import canvas_shape
from backdoorbench_moe.moe.temporary import frozen
from backdoorbench_moe.ops.seeding import generator

# As in the original code: the first weight of the size, and the factors by which it is raised and lowered.
FIRST_WEIGHT, UP, DOWN = 1e-3, 2.0, 2**1.5
# Number of images of 32x32 that are stamped at a time by default: 20 targets with batches of 32.
PIXELS_AT_ONCE = 640 * 32 * 32
# The size counts as improved only if it falls by more than this share.
IMPROVEMENT = 0.01


@dataclass(frozen=True)
class Search:
    """How triggers are searched for.

    Args:
        epochs: Largest number of passes over the images for each target.
        batch_size: Number of images that one step stamps for each target.
        success: Success rate, hits / counts of `Outcome`, that a stamp must reach, in (0, 1).
        patience: Number of epochs after which the weight of the size is changed; the search ends after twice as many
            without a smaller stamp.
        at_once: Number of targets whose stamps are searched for in one pass through the model; as many as stamp
            `PIXELS_AT_ONCE` pixels if None.
        seed: Seed of the initial stamps and of the order of the images.
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
        sizes: Their sizes, the sums of the masks in pixels of the canvas; the size of the canvas if none succeeds.
        success: Their success rates, hits / counts of `Outcome`.
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
        """Process the result of one epoch: keep the stamp if it is the best, adapt the weight, decide whether to stop.

        Args:
            values: (4, h, w), the stamp at the end of the epoch.
            size: Its size.
            success: Success rate in the epoch.
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
    goal: Goal,
    targets: Sequence[int],
    search: Search,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Search for the smallest stamp of each target.

    The search minimises the loss of the goal plus a weight times the size of the stamp on the full image. The weight
    starts at 0.001; it is doubled after `patience` consecutive epochs with a success rate of at least `success`, and
    divided by 2^1.5 after as many below it. The optimizer is Adam with a learning rate of 0.1 and betas of 0.5 and 0.9.
    A search ends after twice `patience` epochs in which the size has not fallen by 1%, once the weight has been changed
    in both directions.

    `at_once` targets share a pass through the model, with the same images. The optimizer is elementwise, so this
    changes the results by rounding errors only.

    Departures from the paper's code: the weight starts at 0.001; in the code it is 0 until the stamp has succeeded for
    `patience` epochs. A search ends after twice `patience` epochs without a smaller stamp; in the code's example, after
    five times as many. Images or patches that are at the target without a stamp, such as the images of the target
    class, are left out. Stamps are compared by their sizes at the end of an epoch; in the code, by the mean size over
    the epoch. The initial stamp of a target is drawn from a seed.

    Args:
        goal: The goal; its model is not changed.
        targets: The numbers of K targets of the goal.
        search: The options.
        progress: Called after every epoch with the number of finished epochs and the largest number of epochs, over all
            groups of targets.

    Source:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV, and its code bolunwang/backdoor.
    """
    images = goal.clean.images
    found = [_Target(number, _start(number, goal, search)) for number in targets]
    with frozen(goal.model.parameters()):
        pixels = search.batch_size * images[0, 0].numel()
        at_once = search.at_once or max(1, PIXELS_AT_ONCE // pixels)
        starts = range(0, len(found), at_once)
        for number, first in enumerate(starts):
            group = found[first : first + at_once]
            for epoch in _search_group(goal, group, search):
                progress(number * search.epochs + epoch, len(starts) * search.epochs)
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
    """Return the success rate of one stamp (4, h, w) for a target, hits / counts of `Outcome`."""
    hits, count = 0.0, 0.0
    for rows in goal.rows(target).split(search.batch_size):
        outcome = goal.outcome(goal.stamp(rows, values.unsqueeze(0)), rows, [target])
        hits, count = hits + outcome.hits.item(), count + outcome.counts.item()
    return hits / max(1, count)


def _start(number: int, goal: Goal, search: Search) -> Tensor:
    """Draw the initial free variables of a target, (4, h, w)."""
    shape = 4, *canvas_shape(goal.clean.images, goal.side)
    drawn = torch.randn(*shape, generator=generator(search.seed, "inversion", number))
    return drawn.to(goal.clean.images.device).requires_grad_()


def _search_group(goal: Goal, group: list[_Target], search: Search) -> Iterator[int]:
    """Search for the stamps of several targets at once; those that are done no longer take part.

    Yields the number of finished epochs after each.
    """
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
        yield epoch + 1


def _run_epoch(
    goal: Goal, active: list[_Target], order: Tensor, optimizer: torch.optim.Optimizer, search: Search
) -> tuple[list[float], list[float]]:
    """Take the steps of one epoch; return the sums of `Outcome.hits` and `Outcome.counts`, for each target."""
    images = goal.clean.images
    targets = [each.number for each in active]
    weights = torch.tensor([each.weight for each in active], device=images.device)
    area = images[0, 0].numel()
    # Counts of images are integers, and exact in float64.
    hits = torch.zeros(len(active), dtype=torch.float64, device=images.device)
    counts = torch.zeros_like(hits)
    for rows in order.to(images.device).split(search.batch_size):
        values = to_values(torch.stack([each.free for each in active]))
        outcome = goal.outcome(goal.stamp(rows, values), rows, targets)
        # The size on the full image, so that a weight means the same for tiles of any side.
        sizes = sizes_of(values) * (area / values[0, 0].numel())
        optimizer.zero_grad(set_to_none=True)
        (outcome.losses + weights * sizes).sum().backward()
        optimizer.step()
        hits += outcome.hits
        counts += outcome.counts
    optimizer.zero_grad(set_to_none=True)
    return hits.tolist(), counts.tolist()
