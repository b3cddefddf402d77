"""Computing a part of a model in fp32 whatever precision the rest of it uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off.

    Routers run in it: bf16 has too few digits to rank gates that are nearly equal.

    Args:
        device: The device of the tensors that are computed with. On "meta" there is no autocast to switch off.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
