"""Plain tuning, the control of every other defense: what the same clean images reach without its idea."""

from __future__ import annotations

from dataclasses import replace

from backdoorbench_moe.bench.record_metrics import base_of, with_base
from backdoorbench_moe.config import PartSpec, RunSpec

PLAIN_TUNING = "fine-tuning"
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

    It has the default options of `fine-tuning`, also where the defense tunes for more epochs, and the same share of
    clean images if the defense is given one.

    Returns:
        The spec; None for an undefended run, and for plain tuning itself.
    """
    if not spec.defenses:
        return None
    last = spec.defenses[-1]
    shared = {key: value for key, value in last.options.items() if key == SHARE}
    tuned = replace(spec, defenses=(*spec.defenses[:-1], PartSpec(PLAIN_TUNING, shared)))
    return None if tuned.digest == spec.digest else tuned
