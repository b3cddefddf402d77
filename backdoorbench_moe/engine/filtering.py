"""Measuring an input filter: it sees images, and never whether they are triggered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.evaluate import BATCH, Metrics, predict
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.ops.detection import auroc
from backdoorbench_moe.ops.metrics import proportion
from backdoorbench_moe.ops.seeding import generator

# Clean and triggered test images each that a filter is measured on: it may pass every one many times.
IMAGES = 2000

Filter = Callable[[Tensor], Tensor]


def measure_filtered(
    model: nn.Module,
    test: Split,
    triggered: tuple[Split, Tensor] | None,
    judge: Filter,
    threshold: float,
    *,
    seed: int,
    precision: str,
) -> Metrics:
    """What a model behind a filter does, on up to IMAGES clean and as many triggered test images, drawn from a seed.

    triggered: as `triggered_test` gives them; None for a clean run. Returns BA, ASR and RA, where a
    rejected image is neither right nor a success of the attacker; AUROC of the scores; TPR and FPR, the shares
    of triggered and of clean images that are rejected. Raises PluginError if the filter gives no such scores.
    """
    clean, known = _draw(test, test.labels, seed, "clean")
    drawn = None if triggered is None else _draw(*triggered, seed, "triggered")
    images = clean.images if drawn is None else torch.cat([clean.images, drawn[0].images])
    scores = _score(judge, images, seed)
    rejected = (scores > threshold).to(images.device)
    predicted = predict(model, images, precision=precision)
    right = (predicted[: len(clean)] == known) & ~rejected[: len(clean)]
    metrics = {"ba": right}
    if drawn is not None:
        split, labels = drawn
        called, kept = predicted[len(clean) :], ~rejected[len(clean) :]
        metrics |= {"asr": (called == split.labels) & kept, "ra": (called == labels) & kept, "tpr": ~kept}
    metrics["fpr"] = rejected[: len(clean)]
    found = {name: asdict(proportion(int(hits.sum()), len(hits))) for name, hits in metrics.items()}
    if drawn is not None:
        values = scores.numpy()
        found["auroc"] = asdict(auroc(values[: len(clean)], values[len(clean) :]))
    return found


def _draw(split: Split, labels: Tensor, seed: int, kind: str) -> tuple[Split, Tensor]:
    """Up to IMAGES of a split, with the labels (N,) beside it."""
    order = torch.randperm(len(split), generator=generator(seed, "filter", kind))[:IMAGES]
    chosen = order.sort().values.to(split.images.device)
    return Split(split.images[chosen], split.labels[chosen]), labels[chosen]


def _score(judge: Filter, images: Tensor, seed: int) -> Tensor:
    """Scores (N,) float64 on the CPU, of the images handed over in a shuffled row, a batch at a time."""
    order = torch.randperm(len(images), generator=generator(seed, "filter", "order"))
    scores = torch.empty(len(images), dtype=torch.float64)
    for part in order.split(BATCH):
        found = judge(images[part.to(images.device)])
        if not isinstance(found, Tensor) or found.shape != part.shape or not found.isfinite().all():
            raise PluginError(
                f"filter: expected a finite score for each of {len(part)} images, "
                f"got {tuple(found.shape) if isinstance(found, Tensor) else found!r}"
            )
        scores[part] = found.detach().to("cpu", torch.float64)
    return scores
