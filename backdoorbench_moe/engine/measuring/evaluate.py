"""Measure a model: clean accuracy, attack success rate, and their baselines and intervals."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.ops.detection import auroc
from backdoorbench_moe.ops.metrics import proportion_of

Metrics = dict[str, dict[str, float]]


def share(hits: Tensor) -> dict[str, float]:
    """The share of True values in (N,) bool, as a metric of a record: percent, n and the Wilson 95% interval."""
    return asdict(proportion_of(hits))


def detection_metrics(
    flagged: Tensor, wanted: Tensor, scores: Tensor | None = None, *, prefix: str = ""
) -> Metrics:
    """Measure the accuracy of a judgement about N inputs, training samples or classes.

    Args:
        flagged: (N,) bool on the CPU, the suspicious items.
        wanted: (N,) bool on the CPU, the items that should be suspicious.
        scores: (N,) floats on the CPU, higher for more suspicious items.
        prefix: Prefix of the keys, such as "sample_".

    Returns:
        `tpr` and `fpr`, the true and false positive rates, and with scores `auroc`. Rates of empty groups are left out:
        a clean run has only `fpr`.
    """
    groups = {"tpr": wanted, "fpr": ~wanted}
    found = {f"{prefix}{name}": share(flagged[group]) for name, group in groups.items() if group.any()}
    if scores is not None and len(found) == len(groups):
        found[f"{prefix}auroc"] = asdict(auroc(scores[~wanted].numpy(), scores[wanted].numpy()))
    return found


def measure(
    model: nn.Module,
    test: Split,
    triggered: Triggered | None,
    *,
    precision: str,
    recovery: bool = False,
    safe: Tensor | None = None,
    plain: Split | None = None,
) -> Metrics:
    """Measure a model on the test images.

    Args:
        model: The model; it is left in evaluation mode.
        test: All clean test images.
        triggered: The triggered test images that count for ASR; None for a clean run.
        precision: "fp32" or "bf16".
        recovery: Whether to measure `ra` too.
        safe: (M,) int64, the safe answers to the triggered images, to measure `unsafe` too.
        plain: The test images that `triggered.places` indexes; None for `test`.

    Returns:
        `ba`: share of clean test images that are classified correctly. With triggered images, also the metrics of
        `marked_metrics`.
    """
    called = predict(model, test.images, precision=precision)
    metrics = {"ba": share(called == test.labels)}
    if triggered is not None:
        predicted = predict(model, triggered.images, precision=precision)
        unmarked = called[triggered.places]
        if plain is not None:
            unmarked = predict(model, plain.images[triggered.places], precision=precision)
        metrics |= marked_metrics(predicted, unmarked, triggered, safe, recovery=recovery)
    return metrics


def marked_metrics(
    predicted: Tensor, unmarked: Tensor, triggered: Triggered, safe: Tensor | None, *, recovery: bool
) -> Metrics:
    """Compute the metrics of predictions for triggered images.

    Args:
        predicted: (M,) int64, the predictions for the triggered images.
        unmarked: (M,) int64, the predictions for the same images without the trigger.
        triggered: The triggered images.
        safe: (M,) int64, the safe answers; None to leave out `unsafe`.
        recovery: Whether to compute `ra` too.

    Returns:
        `asr`: share of the triggered images that are classified as the attacker's class; `target_rate`: the same share
        without the trigger; `ra`: share of the triggered images that are classified correctly; `unsafe`: share of the
        triggered images without a safe answer.
    """
    metrics = {
        "asr": share(predicted == triggered.wanted),
        "target_rate": share(unmarked == triggered.wanted),
    }
    if recovery:
        metrics["ra"] = share(predicted == triggered.true)
    if safe is not None:
        metrics["unsafe"] = share(predicted != safe)
    return metrics
