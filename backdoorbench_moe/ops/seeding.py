"""Random numbers: a separate seed for each purpose, derived from the seed of the run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The constants of SplitMix64 as signed 64-bit integers; torch multiplies them modulo 2**64.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a seed for a purpose; the result is the same on every machine.

    Args:
        seed: The seed of the run.
        *purpose: Words and numbers that name the purpose, such as "order" and the epoch.

    Returns:
        Seed in [0, 2**63).
    """
    text = "/".join(map(str, (seed, *purpose)))
    # Names of files, and thus of classes, may not be valid UTF-8; Python then represents them with surrogates.
    encoded = text.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a generator for a purpose, see `derive_seed`. It is on the CPU, so all devices get the same draws."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generators inside the block, and restore their states afterwards.

    This is for code that does not accept a generator, such as weight initialisation and dropout.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield


def uniform_at(seed: int | Tensor, places: Tensor, *shape: int) -> Tensor:
    """Draw uniform numbers as a function of a seed and of places; they do not depend on the rest of the batch.

    Args:
        seed: In [0, 2**63), see `derive_seed`; a number, or an int64 scalar tensor on the device of `places`.
        places: (N,) int64 from 0, such as indices in the training set; on any device.
        *shape: Shape of the numbers that are drawn for each place.

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
    """Shift int64 to the right, filling with zeros; torch's own shift repeats the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
