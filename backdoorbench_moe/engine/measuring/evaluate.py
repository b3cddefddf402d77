"""Measuring a model: clean accuracy, attack success rate, and what these are worth."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.ops.detection import auroc
from backdoorbench_moe.ops.metrics import proportion

Metrics = dict[str, dict[str, float]]


def share(hits: Tensor) -> dict[str, float]:
    """The share of True in (N,) bool as a record's metric: percent, n and the Wilson 95% interval."""
    return asdict(proportion(int(hits.sum()), len(hits)))


def detection_metrics(
    flagged: Tensor, wanted: Tensor, scores: Tensor | None = None, *, prefix: str = ""
) -> Metrics:
    """Measure how right a judgement about N inputs, training samples or classes is.

    Args:
        flagged: (N,) bool on the CPU, what is suspicious.
        wanted: (N,) bool on the CPU, what should be.
        scores: (N,) floats on the CPU, higher for more suspicious ones.
        prefix: First part of the keys, such as "sample_".

    Returns:
        `tpr` and `fpr`: shares of what should be suspicious, and of all else, that are; with scores also `auroc`. What
        is a share of nothing is left out: of a clean run there is only `fpr`, the rate of false alarms.
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
        triggered: Those that count for ASR, triggered; None for a clean run.
        precision: "fp32" or "bf16".
        recovery: Whether to measure `ra` too.
        safe: (M,) int64, the safe answers to the triggered images, to measure `unsafe` too.
        plain: The test images that `triggered.places` are places in; None if they are `test`.

    Returns:
        `ba`: share of clean test images predicted as labelled. With triggered images also the metrics of
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
    """Compute how triggered images are answered.

    Args:
        predicted: (M,) int64, the predictions for the triggered images.
        unmarked: (M,) int64, the predictions for the same images without the trigger.
        triggered: The triggered images.
        safe: (M,) int64, the safe answers; None to leave out `unsafe`.
        recovery: Whether to compute `ra` too.

    Returns:
        `asr`: share of them predicted as the attacker wants; `target_rate`: share of the same images, without the
        trigger, that are predicted as the attacker wants anyway; `ra`: share of them predicted as what they are;
        `unsafe`: share of them not answered safely.
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
