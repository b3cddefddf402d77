"""The metrics of records: key, name, unit, and which direction is better.

This table only describes metrics. Which of them a run has depends on the kind of run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from backdoorbench_moe.errors import UnknownNameError

PERCENT, POINTS, SECONDS = "%", "percentage points", "s"


@dataclass(frozen=True)
class Metric:
    """Description of a metric.

    Args:
        key: Name in a record, such as "asr" or "task/2.ba".
        name: Full name, such as "attack success rate".
        short: Name for narrow columns, such as "ASR".
        unit: "%", "percentage points" or "s".
        better: Which direction is better for the model's owner, who defends it. None for a metric of another
            model, such as the clean twin, and for a share of the gates that is neither good nor bad.
        suffix: Suffix of the name for a qualified key, such as " of task/2" or " after pruned".
    """

    key: str
    name: str
    short: str
    unit: str
    better: Literal["higher", "lower"] | None
    suffix: str = ""

    @property
    def base(self) -> str:
        """The key without qualifiers: "pruned.asr" -> "asr"."""
        return self.key.rpartition(".")[2]

    @property
    def label(self) -> str:
        """Name and, where it is an acronym, short name: "attack success rate (ASR) after pruned"."""
        acronym = f" ({self.short})" if self.short.isupper() else ""
        return f"{self.name}{acronym}{self.suffix}"

    @property
    def title(self) -> str:
        """Label and unit: "attack success rate (ASR), %"."""
        return f"{self.label}, {self.unit}"

    @property
    def heading(self) -> str:
        """Qualifiers and short name, for the heading of a column: "pruned ASR"."""
        return " ".join([*self.key.split(".")[:-1], self.short])


METRICS = {
    one.key: one
    for one in (
        Metric("ba", "clean accuracy", "BA", PERCENT, "higher"),
        Metric("asr", "attack success rate", "ASR", PERCENT, "lower"),
        # Measured on the images of ASR without their trigger.
        Metric("target_rate", "target rate without the trigger", "no trigger", PERCENT, "lower"),
        Metric("twin_ba", "clean accuracy of the clean twin", "twin BA", PERCENT, None),
        Metric("twin_asr", "attack success rate of the clean twin", "twin ASR", PERCENT, None),
        Metric(
            "twin_target_rate",
            "target rate of the clean twin",
            "twin, no trigger",
            PERCENT,
            None,
        ),
        Metric(
            "twin_unsafe", "marked images not answered safely by the clean twin", "twin unsafe", PERCENT, None
        ),
        Metric(
            "twin_harm_share",
            "share of the same experts for marked images in the clean twin",
            "twin harm share",
            PERCENT,
            None,
        ),
        Metric(
            "twin_own_share",
            "share of the same experts for their own tasks in the clean twin",
            "twin own share",
            PERCENT,
            None,
        ),
        Metric(
            "twin_clean_share",
            "share of the same experts for clean images in the clean twin",
            "twin clean share",
            PERCENT,
            None,
        ),
        Metric("ra", "accuracy on triggered images", "RA", PERCENT, "higher"),
        Metric("cad", "clean accuracy drop", "CAD", POINTS, "lower"),
        # Of defended runs; never in a record, see `bench.tables.tuning`.
        Metric(
            "ba_over_tuning",
            "clean accuracy minus that of plain tuning of the same length",
            "BA − tuning",
            POINTS,
            "higher",
        ),
        Metric(
            "asr_over_tuning",
            "attack success rate minus that of plain tuning of the same length",
            "ASR − tuning",
            POINTS,
            "lower",
        ),
        # Of mixtures of experts; see `engine.measuring.mixtures`.
        Metric("unsafe", "marked images not answered safely", "unsafe", PERCENT, "lower"),
        Metric("overall", "accuracy in percent of the benign experts'", "Overall", PERCENT, "higher"),
        Metric(
            "alone_asr",
            "attack success rate of the poisoned experts by themselves",
            "alone ASR",
            PERCENT,
            None,
        ),
        Metric("expert_ba", "clean accuracy of the benign expert", "expert BA", PERCENT, None),
        Metric("benign_ba", "clean accuracy of the expert before poisoning", "benign BA", PERCENT, None),
        Metric(
            "harm_share", "share of the poisoned experts for marked images", "harm share", PERCENT, "lower"
        ),
        Metric("own_share", "share of the poisoned experts for their own tasks", "own share", PERCENT, None),
        Metric("clean_share", "share of the poisoned experts for clean images", "clean share", PERCENT, None),
        Metric("auroc", "area under the ROC curve", "AUROC", PERCENT, "higher"),
        Metric("tpr", "triggered images rejected", "TPR", PERCENT, "higher"),
        Metric("fpr", "clean images rejected", "FPR", PERCENT, "lower"),
        # Of judgements about classes; see `engine.measuring.judging`.
        Metric("class_tpr", "attacker's classes flagged", "class TPR", PERCENT, "higher"),
        Metric("class_fpr", "other classes flagged", "class FPR", PERCENT, "lower"),
        # Of a defense that judges training images; see `engine.measuring.samples`.
        Metric("sample_auroc", "AUROC over training images", "sample AUROC", PERCENT, "higher"),
        Metric("sample_tpr", "poisoned training images found", "sample TPR", PERCENT, "higher"),
        Metric("sample_fpr", "other training images thrown out", "sample FPR", PERCENT, "lower"),
        Metric("seconds", "time", "seconds", SECONDS, "lower"),
    )
}


def metric(key: str, what: str = "metric") -> Metric:
    """Look up a metric by its key, which may be qualified.

    Qualifiers precede the key, separated by dots. A qualifier with a slash names a part of the data ("task/2.ba"). Any
    other qualifier names the stage of a defense after which the metric was measured ("pruned.asr"). There may be
    several ("pruned.task/2.ba").

    Args:
        key: Key of `METRICS`, with or without qualifiers.
        what: What to call the key in error messages.

    Returns:
        The metric, with the qualifiers in its label and heading.

    Raises:
        UnknownNameError: If the key without qualifiers is not in `METRICS`, or a qualifier is empty.
    """
    *qualifiers, base = key.split(".")
    if base not in METRICS:
        raise UnknownNameError(f"{what} {key!r}" if qualifiers else what, base, METRICS)
    if not all(qualifiers):
        raise UnknownNameError(what, key, METRICS)
    parts = [text for text in qualifiers if "/" in text]
    stages = [text for text in qualifiers if "/" not in text]
    suffix = "".join([*(f" of {text}" for text in parts), *(f" after {text}" for text in stages)])
    return replace(METRICS[base], key=key, suffix=suffix)


def sort_metrics(keys: Iterable[str]) -> list[Metric]:
    """Look up the metrics of a record, in the order of `METRICS`.

    Args:
        keys: Keys of a record. Unlike in `metric`, unknown keys are allowed, since a record may come from a newer
            version or a plug-in. Their name is the key.

    Returns:
        Metrics without qualifiers, then qualified ones, then unknown ones, each group in table order.
    """
    order = list(METRICS)
    found = []
    for key in keys:
        try:
            one = metric(key)
        except UnknownNameError:
            one = Metric(key, key, key, "", None)
        known = one.base in METRICS
        rank = order.index(one.base) if known else len(order)
        found.append((not known, "." in key, key.rpartition(".")[0], rank, one))
    return [row[-1] for row in sorted(found, key=lambda row: row[:-1])]
