"""The context of a precision."""

from __future__ import annotations

import torch

from backdoorbench_moe.engine.device import autocast

CPU = torch.device("cpu")


def state() -> tuple[bool, bool]:
    """Whether autocast is on, and whether attention may be fused."""
    return torch.is_autocast_enabled("cpu"), torch.backends.cuda.flash_sdp_enabled()


def test_attention_is_plain_where_it_trains_in_bf16_on_a_cpu_and_nowhere_else() -> None:
    assert state() == (False, True)
    with autocast(CPU, "bf16"):
        assert state() == (True, False)
    with autocast(CPU, "fp32"):
        assert state() == (False, True)
    with torch.inference_mode(), autocast(CPU, "bf16"):
        assert state() == (True, True)
    assert state() == (False, True)
