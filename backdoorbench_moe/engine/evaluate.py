"""Measuring a model: clean accuracy, attack success rate, and what these are worth."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.triggered import Triggered
from backdoorbench_moe.ops.metrics import proportion

Metrics = dict[str, dict[str, float]]


def share(hits: Tensor) -> dict[str, float]:
    """The share of True in (N,) bool as a record's metric: percent, n and the Wilson 95% interval."""
    return asdict(proportion(int(hits.sum()), len(hits)))


def measure(
    model: nn.Module,
    test: Split,
    triggered: Triggered | None,
    *,
    precision: str,
    recovery: bool = False,
) -> Metrics:
    """Measure a model on the test images.

    Args:
        model: The model; it is left in evaluation mode.
        test: All clean test images.
        triggered: Those that count for ASR, triggered; None for a clean run.
        precision: "fp32" or "bf16".
        recovery: Whether to measure `ra` too.

    Returns:
        `ba`: share of clean test images predicted as labelled. With triggered images also `asr`: share of them
        predicted as the attacker wants; `target_rate`: share of the same images, without the trigger, that are
        predicted as the attacker wants anyway; and `ra`: share of them predicted as what they are.
    """
    called = predict(model, test.images, precision=precision)
    metrics = {"ba": share(called == test.labels)}
    if triggered is not None:
        predicted = predict(model, triggered.images, precision=precision)
        metrics["asr"] = share(predicted == triggered.wanted)
        metrics["target_rate"] = share(called[triggered.places] == triggered.wanted)
        if recovery:
            metrics["ra"] = share(predicted == triggered.true)
    return metrics
