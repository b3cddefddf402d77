"""Loading the next batches while the current one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
# Batches that are loaded ahead, and threads that load them.
AHEAD, THREADS = 3, 2


def prefetched(load: Callable[[Item], Loaded], items: Iterable[Item]) -> Iterator[Loaded]:
    """Yield `load(item)` for each item, in order, while threads load the next ones.

    Args:
        load: Function that waits for a disk or otherwise releases the global interpreter lock. Its exceptions are
            raised when its result is due.
        items: Its arguments.
    """
    waiting: deque[Future[Loaded]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prefetch")
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def moved(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield batches on a GPU. The next one is copied during the computations on the current one.

    Args:
        batches: Tensors on the CPU.
        device: The GPU.
    """
    stream = torch.cuda.Stream(device)
    ready: tuple[Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = batch.pin_memory().to(device, non_blocking=True)
            event = stream.record_event()
        if ready is not None:
            yield _arrived(*ready)
        ready = copy, event
    if ready is not None:
        yield _arrived(*ready)


def _arrived(copy: Tensor, event: torch.cuda.Event) -> Tensor:
    """Let the current stream wait for a copy on another stream, and keep its memory until it has been used."""
    present = torch.cuda.current_stream(copy.device)
    present.wait_event(event)
    copy.record_stream(present)
    return copy
