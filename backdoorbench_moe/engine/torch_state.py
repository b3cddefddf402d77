"""PyTorch's global settings during the computations of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def default_torch_state() -> Iterator[None]:
    """Use PyTorch's defaults inside the block, whatever the caller has set; also a decorator.

    Gradients are enabled, inference mode and autocast are off, the default dtype is float32, the default device the
    CPU, and the precision of matrix products "highest". Otherwise, a call under `torch.no_grad()` could not train, and
    another default dtype or precision would change the results. The caller's settings are restored at the end.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            # Only if necessary, since it slows down every call of a PyTorch function.
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_highest_precision())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _highest_precision() -> Iterator[None]:
    """Undo `torch.set_float32_matmul_precision` inside the block."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The caller has set a precision for a single backend, which torch does not mix with this one.
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
