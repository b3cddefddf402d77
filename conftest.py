"""The environment of all tests, of the package and of the plug-ins: set before any of them imports torch."""

from __future__ import annotations

import os
import tempfile

# One thread per process: xdist runs as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait sleep, where a test asks for more: on a busy machine, spinning costs more than the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The cache of decoded images is deleted after the tests.
if "BBMOE_CACHE" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="bbmoe-cache-")
    os.environ["BBMOE_CACHE"] = CACHE.name
