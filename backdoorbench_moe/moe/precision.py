"""Computing a part of a model in fp32 under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off.

    Routers use it, because bf16 is too coarse to rank gates that are nearly equal.

    Args:
        device: The device of the tensors. The device "meta" has no autocast.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
