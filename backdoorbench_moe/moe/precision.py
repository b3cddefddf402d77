"""The precision of a block: bf16 for passes through a model, fp32 for a part of it that needs it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def in_precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return a context that computes in a precision.

    bf16 has the range of float32, so losses need no scaling.

    Args:
        device: The device of the tensors.
        precision: "fp32" or "bf16".
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off.

    Routers use it, because bf16 is too coarse to rank gates that are nearly equal.

    Args:
        device: The device of the tensors. The device "meta" has no autocast.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
