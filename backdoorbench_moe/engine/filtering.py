"""Measuring an input filter: it sees images, and never whether they are triggered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.evaluate import Metrics, share
from backdoorbench_moe.engine.inference import BATCH, predict
from backdoorbench_moe.engine.triggered import Triggered
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.ops.detection import auroc
from backdoorbench_moe.ops.seeding import generator

# Clean and triggered test images each that a filter is measured on: it may pass every one many times.
IMAGES = 2000

Filter = Callable[[Tensor], Tensor]


def measure_filtered(
    model: nn.Module,
    test: Split,
    triggered: Triggered | None,
    judgement: Judgement,
    *,
    seed: int,
    precision: str,
) -> Metrics:
    """What a model behind a filter does, on up to IMAGES clean and as many triggered test images, drawn from a seed.

    triggered: as `triggered_test` gives them; None for a clean run. Returns BA, ASR and RA, where a
    rejected image is neither right nor a success of the attacker; AUROC of the scores; TPR and FPR, the shares
    of triggered and of clean images that are rejected. Raises PluginError if the filter gives no such scores.
    """
    clean = _draw(len(test), seed, "clean").to(test.images.device)
    clean_images, known = test.images[clean], test.labels[clean]
    drawn = None
    if triggered is not None:
        drawn = triggered.take(_draw(len(triggered), seed, "triggered").to(test.images.device))
    images = clean_images if drawn is None else torch.cat([clean_images, drawn.images])
    assert judgement.judge is not None and judgement.threshold is not None
    scores = _score(judgement.judge, images, seed)
    rejected = (scores > judgement.threshold).to(images.device)
    predicted = predict(model, images, precision=precision)
    right = (predicted[: len(clean)] == known) & ~rejected[: len(clean)]
    metrics = {"ba": right}
    if drawn is not None:
        called, kept = predicted[len(clean) :], ~rejected[len(clean) :]
        metrics |= {"asr": (called == drawn.wanted) & kept, "ra": (called == drawn.true) & kept, "tpr": ~kept}
    metrics["fpr"] = rejected[: len(clean)]
    found = {name: share(hits) for name, hits in metrics.items()}
    if drawn is not None:
        values = scores.numpy()
        found["auroc"] = asdict(auroc(values[: len(clean)], values[len(clean) :]))
    return found


def _draw(count: int, seed: int, kind: str) -> Tensor:
    """Draw up to IMAGES of `count` images: int64 indices, ascending."""
    order = torch.randperm(count, generator=generator(seed, "filter", kind))[:IMAGES]
    return order.sort().values


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
