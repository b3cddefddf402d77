"""Freed memory is kept: fewer page faults, unless the user has settings of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")

# Twenty times 64 MB, each freed before the next one is asked for; every page is written.
SCRIPT = """
import resource, sys
from backdoorbench_moe.process.allocator import keep_freed_memory
done = sys.argv[1] == "keep" and keep_freed_memory()
import torch
torch.set_num_threads(1)
for _ in range(10):  # Until the heap has its size.
    torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16_000_000)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(way: str, **variables: str) -> tuple[bool, int]:
    """Whether the settings were made in a process, and the page faults of the last ten tensors."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done, faults = subprocess.run(
        [sys.executable, "-c", SCRIPT, way],
        env={**environment, **variables},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return done == "True", int(faults)


def test_a_tensor_takes_the_memory_of_the_one_before() -> None:
    done, kept = page_faults("keep")
    if not done:
        pytest.skip("the C library has no mallopt")
    _, as_it_is = page_faults("leave")
    assert kept < 200
    assert as_it_is > 10 * 16_000_000 * 4 / (2 << 20)  # More than one a huge page of 2 MiB.


def test_settings_of_the_user_have_precedence() -> None:
    done, _ = page_faults("keep", MALLOC_TOP_PAD_="131072")
    assert not done
