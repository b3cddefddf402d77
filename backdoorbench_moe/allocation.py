"""Failed allocations of memory as errors of one line, without the C++ text of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from backdoorbench_moe.errors import BbmoeError, ConfigError

# Parts of the messages of torch and numpy. Sizes that overflow an integer are too large for any memory.
SIGNS = (
    "can't allocate memory",
    "out of memory",
    "storage size calculation overflowed",
    "integer multiplication overflow",
    "overflow when unpacking",
    "too large to convert to c ",
)
ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?([kmgtpe]?)i?b", re.IGNORECASE)
STEP = 1024


@contextmanager
def refusing_sizes(message: str) -> Iterator[None]:
    """Inside the block, raise failed allocations as a ConfigError.

    Args:
        message: What does not fit into memory, such as "model 'pmoe': does not fit into memory". The size of the
            allocation is added if it is known.
    """
    try:
        yield
    except BbmoeError:
        raise
    except Exception as error:
        if not is_failed_allocation(error):
            raise
        raise ConfigError(f"{message}{_asked(str(error))}") from error


def is_failed_allocation(error: Exception) -> bool:
    """Return whether an exception says that memory cannot be allocated. torch raises RuntimeErrors on the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in SIGNS)


def _asked(text: str) -> str:
    """Return the size of the allocation in a message, in GiB, as an addition to an error; empty if there is none."""
    if (found := ASKED.search(text)) is None:
        return ""
    number, unit = found.groups()
    size = float(number) * STEP ** " kmgtpe".index(unit.lower() or " ") / STEP**3
    return f"; it asked for {size:,.1f} GiB at once"
