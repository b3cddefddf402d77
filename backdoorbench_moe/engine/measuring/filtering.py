"""Measure an input filter, which does not know which images are triggered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.measuring.evaluate import Metrics, detection_metrics, share
from backdoorbench_moe.engine.measuring.mixtures import mean_share
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.ops.images import batch_size_for
from backdoorbench_moe.ops.seeding import generator

# Number of clean and of triggered test images on which a filter is measured. Filters may be slow.
IMAGES = 2000


def measure_filtered(
    model: nn.Module,
    test: Split,
    triggered: Triggered | None,
    judgement: Judgement,
    *,
    seed: int,
    precision: str,
    safe: Tensor | None = None,
    tasks: Sequence[int] | None = None,
) -> Metrics:
    """Measure a model together with an input filter.

    Up to `IMAGES` clean and up to `IMAGES` triggered test images are drawn.

    Args:
        model: The model.
        test: The test images; for a mixture, those of all its tasks.
        triggered: The triggered test images; None for a clean run.
        judgement: The judgement about inputs, whose `judge` and `threshold` are the filter.
        seed: Seed of the draws.
        precision: "fp32" or "bf16".
        safe: (M,) int64, the safe answers to the triggered images, to measure `unsafe` too.
        tasks: For a mixture, the number of test images of each task, in the order of `test`; BA is then the mean over
            the tasks, as without a filter.

    Returns:
        BA, ASR and RA, where a rejected image counts neither as correct nor as an attack success; with safe answers
        also `unsafe`, where a rejected image counts as answered safely; AUROC of the scores; TPR and FPR, the shares of
        triggered and clean images that are rejected. Only BA and FPR for a clean run.

    Raises:
        PluginError: The filter does not return a finite score for each image.
    """
    clean = _draw(len(test), seed, "clean").to(test.images.device)
    clean_images, known = test.images[clean], test.labels[clean]
    drawn = None
    if triggered is not None:
        rows = _draw(len(triggered), seed, "triggered").to(test.images.device)
        drawn = triggered.take(rows)
    images = clean_images if drawn is None else torch.cat([clean_images, drawn.images])
    assert judgement.judge is not None and judgement.threshold is not None
    scores = _score(judgement.judge, images, seed)
    rejected = (scores > judgement.threshold).to(images.device)
    predicted = predict(model, images, precision=precision)
    right = (predicted[: len(clean)] == known) & ~rejected[: len(clean)]
    metrics = {"ba": right}
    if drawn is not None:
        called, kept = predicted[len(clean) :], ~rejected[len(clean) :]
        metrics |= {"asr": (called == drawn.wanted) & kept, "ra": (called == drawn.true) & kept}
        if safe is not None:
            metrics["unsafe"] = (called != safe[rows]) & kept
    is_triggered = torch.arange(len(images)) >= len(clean)
    found = {name: share(hits) for name, hits in metrics.items()}
    if tasks is not None:
        found["ba"] = mean_share([share(hits) for hits in _by_task(right.cpu(), clean.cpu(), tasks)])
    return found | detection_metrics(rejected.cpu(), is_triggered, scores)


def _by_task(values: Tensor, places: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Divide values of images among the tasks; a task without images is left out.

    Args:
        values: (n,).
        places: (n,) int64, the index of each image in the images of all tasks, one task after the other.
        sizes: Number of images of each task.
    """
    tasks = torch.searchsorted(torch.tensor(sizes).cumsum(0), places, right=True)
    return [values[tasks == number] for number in tasks.unique().tolist()]


def _draw(count: int, seed: int, kind: str) -> Tensor:
    """Draw up to `IMAGES` of `count` images, as ascending int64 indices."""
    order = torch.randperm(count, generator=generator(seed, "filter", kind))[:IMAGES]
    return order.sort().values


def _score(judge: Callable[[Tensor], Tensor], images: Tensor, seed: int) -> Tensor:
    """Score the images in shuffled batches; (N,) float64 on the CPU."""
    order = torch.randperm(len(images), generator=generator(seed, "filter", "order"))
    scores = torch.empty(len(images), dtype=torch.float64)
    for indices in order.split(batch_size_for(images)):
        found = judge(images[indices.to(images.device)])
        if not isinstance(found, Tensor) or found.shape != indices.shape or not found.isfinite().all():
            raise PluginError(
                f"filter: expected a finite score for each of {len(indices)} images, got {_describe(found)}"
            )
        scores[indices] = found.detach().to("cpu", torch.float64)
    return scores


def _describe(scores: object) -> str:
    """Describe scores that are not valid: their shape, and how many are finite."""
    if not isinstance(scores, Tensor):
        return repr(scores)
    return f"{tuple(scores.shape)}, {int(scores.isfinite().sum())} of them finite"
