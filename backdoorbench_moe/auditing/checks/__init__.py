"""The checks of an audit, in the order in which they are run, fast ones first."""

from __future__ import annotations

from collections.abc import Sequence

from backdoorbench_moe.auditing.check import Check
from backdoorbench_moe.auditing.checks.behaviour import ScaledImages, ScaledNorms
from backdoorbench_moe.auditing.checks.inversion import CapturedExpert, InvertedImage, InvertedPatch
from backdoorbench_moe.auditing.checks.latents import (
    ClassRouting,
    LatentClusters,
    LatentSpectrum,
    TaskLatents,
)
from backdoorbench_moe.auditing.checks.margins import LargestMargin, UniversalImage, UniversalPatch
from backdoorbench_moe.auditing.checks.routing import DormantExperts
from backdoorbench_moe.auditing.checks.weights import (
    ChannelNorms,
    ExpertDistance,
    ExpertNorms,
    ExpertSpectra,
    GateRows,
    HeadRows,
)
from backdoorbench_moe.errors import ConfigError, UnknownNameError

CHECKS: tuple[Check, ...] = (
    GateRows(),
    ExpertNorms(),
    ExpertSpectra(),
    ExpertDistance(),
    HeadRows(),
    ChannelNorms(),
    DormantExperts(),
    ClassRouting(),
    LatentClusters(),
    LatentSpectrum(),
    TaskLatents(),
    ScaledImages(),
    ScaledNorms(),
    LargestMargin(),
    UniversalImage(),
    UniversalPatch(),
    InvertedImage(),
    InvertedPatch(),
    CapturedExpert(),
)


def find_checks(names: Sequence[str] | None = None) -> tuple[Check, ...]:
    """Return the checks with these names, in the order of `CHECKS`; all if None.

    Raises:
        UnknownNameError: A check does not exist.
        ConfigError: `names` is empty.
    """
    if names is None:
        return CHECKS
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise UnknownNameError("checks", name, known)
    if not names:
        raise ConfigError.expected("checks", "names of checks", list(names))
    return tuple(check for check in CHECKS if check.name in names)
