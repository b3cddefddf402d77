"""One seed for each purpose, all derived from the run's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The constants of SplitMix64 as signed 64-bit integers, which torch multiplies modulo 2**64.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a seed in [0, 2**63) for a purpose such as ("order", epoch); the same on every machine."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for a purpose. Draws are made on the CPU, so that every device gets the same."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them afterwards.

    For code that takes no generator: weight initialisation of other people's models, dropout.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield


def uniform_at(seed: int, places: Tensor, *shape: int) -> Tensor:
    """Draw uniform numbers as a function of a seed and of places, whatever else is in the batch.

    Args:
        seed: In [0, 2**63), see `derive_seed`.
        places: (N,) int64 from 0, such as indices in the training set; on any device.
        *shape: Shape of what is drawn for each place.

    Returns:
        (N, *shape) float32 in [0, 1), on the device of `places`: element e of place p is the upper 24 bits of output
        number p * prod(shape) + e of SplitMix64.

    Source:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    count = math.prod(shape)
    elements = torch.arange(count, dtype=torch.int64, device=places.device)
    state = (places.unsqueeze(1) * count + elements + 1) * GOLDEN + seed
    for shift, factor in MIX:
        state = (state ^ _shift_right(state, shift)) * factor
    bits = _shift_right(state ^ _shift_right(state, 31), 40)
    return (bits.float() / (1 << 24)).view(len(places), *shape)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift of int64; torch's own copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
