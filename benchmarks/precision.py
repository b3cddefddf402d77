"""Evaluate trained models in bf16 and in fp32: BA, ASR, and whether the routers select the same patches.

    python benchmarks/precision.py runs/*/ --data-root DIR [--images 2000]

Overlap is the intersection over union (Jaccard index) of the patches that an expert selects in the two precisions,
averaged over images, experts and layers, on clean and on triggered test images; agreeing predictions are counted on the
same images. `bbmoe bench run precision` trains in both precisions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from recalibrate import load_images
from torch import Tensor, nn

from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.inference import forward, forward_routed
from backdoorbench_moe.engine.measuring.evaluate import measure
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.moe.routed import RoutedModel

PRECISIONS = ("bf16", "fp32")
BATCH = 500


@dataclass(frozen=True)
class Agreement:
    """Percentages of agreeing predictions, and of overlap of the selected patches (None without routing)."""

    predictions: float
    overlap: float | None


@torch.inference_mode()
def predict_and_select(model: nn.Module, images: Tensor, precision: str) -> tuple[Tensor, list[Tensor]]:
    """Return predictions (N,) and, for every layer, selected patches (N, E, P) bool of (N, 3, H, W) uint8 images."""
    predicted, selected = [], []
    for part in images.split(BATCH):
        if isinstance(model, RoutedModel):
            output = forward_routed(model, part, precision=precision)
            selected.append([routing.selected for routing in output.routing])
            predicted.append(output.logits.argmax(1))
        else:
            predicted.append(forward(model, part, precision=precision).argmax(1))
    return torch.cat(predicted), [torch.cat(layer) for layer in zip(*selected, strict=True)]


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union (...) of (..., P) bool sets; 1 for two empty sets."""
    union = (first | second).sum(-1)
    return torch.where(union == 0, 1.0, (first & second).sum(-1) / union.clamp(min=1))


def agree(model: nn.Module, images: Tensor) -> Agreement:
    """Measure how well the two precisions agree on some images."""
    (first, first_layers), (second, second_layers) = (
        predict_and_select(model, images, each) for each in PRECISIONS
    )
    overlaps = [jaccard(*pair).mean() for pair in zip(first_layers, second_layers, strict=True)]
    overlap = 100 * torch.stack(overlaps).mean().item() if overlaps else None
    return Agreement(100 * (first == second).float().mean().item(), overlap)


def rows(run: Run, images: ImageSet, count: int) -> list[list[str]]:
    """Return one row for clean and one for triggered images."""
    model = run.model().to(memory_format=torch.channels_last)
    triggered = triggered_test(images, run.attack(), run.stamper()) if run.spec.attacked else None
    metrics = {each: measure(model, images.test, triggered, precision=each) for each in PRECISIONS}
    made = []
    for kind, metric, shown in (
        ("clean", "ba", images.test.images),
        ("triggered", "asr", triggered and triggered.images),
    ):
        if shown is not None:
            found = agree(model, shown[:count])
            values = [f"{metrics[each][metric]['value']:.2f}" for each in PRECISIONS]
            overlap = "–" if found.overlap is None else f"{found.overlap:.2f}"
            made.append([kind, metric.upper(), *values, f"{found.predictions:.2f}", overlap])
    return made


def main() -> None:
    """Print a Markdown table with two rows per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=2000, help="images for the agreement [2000]")
    args = parser.parse_args()
    header = ["run", "images", "metric", *PRECISIONS, "same prediction, %", "routing overlap, %"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for folder in args.runs:
        run = load_run(folder)
        if run.record.status == "finished":
            for row in rows(run, load_images(run.spec, args.data_root), args.images):
                print(f"| {folder.name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
