"""Check the options of the parts of a suite without building them."""

from __future__ import annotations

from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import BbmoeError


def check_options(suite: Suite) -> None:
    """Check the names and types of the options of every part of a suite, without reading data.

    Raises:
        BbmoeError: The first error found, in the words of `bbmoe bench run`; it names the run.
    """
    for cell in suite.cells:
        try:
            _check(cell.spec)
        except BbmoeError as error:
            raise BbmoeError(f"suite {suite.label}: {cell.spec.name}: {error}") from error


def _check(spec: RunSpec) -> None:
    for kind, part in spec.parts():
        options = dict(part.options)
        if kind == "dataset" and "root" in REGISTRIES[kind].options(part.name):
            options.setdefault("root", ".")  # Only runs need the folder of the data.
        REGISTRIES[kind].check(part.name, options)
