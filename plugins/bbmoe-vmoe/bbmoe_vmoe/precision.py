"""Computing a router in fp32 whatever the rest is computed in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside the block: bf16 has too few digits to rank near-equal gates."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
