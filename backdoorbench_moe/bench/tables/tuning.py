"""Plain tuning, the baseline of all defenses: fine-tuning on the same clean images, without the defense's method."""

from __future__ import annotations

from dataclasses import replace

from backdoorbench_moe import defenses
from backdoorbench_moe.bench.tables.record_metrics import base_of, with_base
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.errors import BbmoeError

PLAIN_TUNING = "fine-tuning"
# Option for the number of epochs.
LENGTH = "epochs"
# Option for the number of images that the defender has.
SHARE = "clean_fraction"
# Metrics that are differences from plain tuning, and the compared metrics.
COMPARED = {"ba_over_tuning": "ba", "asr_over_tuning": "asr"}


def uses_tuning(key: str) -> bool:
    """Return whether a metric is a difference from plain tuning."""
    return base_of(key) in COMPARED


def compared_key(key: str) -> str:
    """Return the key of the compared metric: "asr_over_tuning" -> "asr"."""
    return with_base(key, COMPARED[base_of(key)])


def plain_tuning(spec: RunSpec) -> RunSpec | None:
    """Return the run with which a defended run is compared: plain tuning instead of its last defense.

    It has the default options of `fine-tuning`, except for the number of epochs, which is that of the defense's own
    tuning, if any, and for the share of clean images, which is that given to the defense, if any.

    Returns:
        The spec; None for an undefended run, and for plain tuning itself.
    """
    if not spec.defenses:
        return None
    last = spec.defenses[-1]
    shared = {key: value for key, value in last.options.items() if key == SHARE}
    usual, epochs = tuning_epochs(PartSpec(PLAIN_TUNING)), tuning_epochs(last)
    if epochs and epochs != usual:
        shared[LENGTH] = epochs
    tuned = replace(spec, defenses=(*spec.defenses[:-1], PartSpec(PLAIN_TUNING, shared)))
    return None if tuned.digest == spec.digest else tuned


def tuning_epochs(part: PartSpec) -> int | None:
    """Return the number of epochs for which a defense tunes; None if it does not tune, or is not installed."""
    try:
        option = defenses.registry.lookup(part.name).tuning_length
        if option is None:
            return None
        given = part.options.get(option)
        return defenses.registry.options(part.name)[option].default if given is None else given
    except BbmoeError:  # The record may come from a machine with other plug-ins.
        return None
