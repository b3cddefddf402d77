"""Plain tuning, the control of every other defense: what the same clean images reach without its idea."""

from __future__ import annotations

from dataclasses import replace

from backdoorbench_moe import defenses
from backdoorbench_moe.bench.tables.record_metrics import base_of, with_base
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.errors import BbmoeError

PLAIN_TUNING = "fine-tuning"
# Its option for the number of epochs.
LENGTH = "epochs"
# The option that says how many images the defender holds.
SHARE = "clean_fraction"
# Metrics that are differences to plain tuning, and what is compared.
COMPARED = {"ba_over_tuning": "ba", "asr_over_tuning": "asr"}


def uses_tuning(key: str) -> bool:
    """Return whether a metric is a difference to plain tuning."""
    return base_of(key) in COMPARED


def compared_key(key: str) -> str:
    """Return the key of the metric that is compared: "asr_over_tuning" -> "asr"."""
    return with_base(key, COMPARED[base_of(key)])


def plain_tuning(spec: RunSpec) -> RunSpec | None:
    """Return the run that a defended run is compared with: plain tuning in the place of its last defense.

    It has the default options of `fine-tuning`, but for two: it is as long as the defense tunes, if it does, and it has
    the same share of clean images if the defense is given one.

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
    """Return for how many epochs a defense tunes; None if it does not, or is not installed here."""
    try:
        option = defenses.registry.lookup(part.name).tuning_length
        if option is None:
            return None
        given = part.options.get(option)
        return defenses.registry.options(part.name)[option].default if given is None else given
    except BbmoeError:  # A record may be of a machine with other plug-ins.
        return None
