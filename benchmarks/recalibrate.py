"""What slow batch norm costs: BA and ASR of finished runs, as recorded and with fresh BN statistics.

Beside them the share of clean images of other classes that are called the target (class 0 for a clean run): a
model that answers so without any trigger gets that much ASR for nothing.

The reference's BN follows the batches at 0.01 a step; at a constant learning rate of 0.1 the running
statistics lag behind the weights. Training never reads them, so averaging them anew over the run's own
(poisoned) training images gives the model that a faster BN would have had, without training again.

    python benchmarks/recalibrate.py runs/*/ --data-root DIR [--images 12800]
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.build import build_dataset
from backdoorbench_moe.engine.inference import forward, predict
from backdoorbench_moe.engine.poison import poisoned
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.triggered import triggered_test
from backdoorbench_moe.ops.metrics import Proportion, proportion
from backdoorbench_moe.ops.seeding import generator

BATCH = 128


@dataclass(frozen=True)
class Measured:
    """Metrics of a model: `asr` is None for a clean run, `called_target` counts clean images."""

    ba: Proportion
    asr: Proportion | None
    called_target: Proportion


def renew_statistics(model: nn.Module, batches: list[torch.Tensor], precision: str) -> None:
    """Replace every BN's running statistics by the mean over `batches` of (B, 3, H, W) uint8 images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # A plain average over the batches.
    model.train()
    with torch.no_grad():
        for images in batches:
            forward(model, images, precision=precision)


def measure(run: Run, model: nn.Module, images: ImageSet) -> Measured:
    """BA, ASR and called-target of a model on the test images of `images`."""
    spec, precision = run.spec, run.record.environment["precision"]
    predicted = predict(model, images.test.images, precision=precision)
    others = images.test.labels != spec.poison.target
    ba = proportion(int((predicted == images.test.labels).sum()), len(images.test))
    called = proportion(int((predicted[others] == spec.poison.target).sum()), int(others.sum()))
    if not spec.attacked:
        return Measured(ba, None, called)
    triggered = triggered_test(images, run.attack(), run.stamper())
    fooled = predict(model, triggered.images, precision=precision) == triggered.wanted
    return Measured(ba, proportion(int(fooled.sum()), len(triggered)), called)


def renew(run: Run, model: nn.Module, images: ImageSet, count: int) -> None:
    """Renew the model's BN statistics on `count` of the run's own (poisoned) training images."""
    spec, train, precision = run.spec, images.train, run.record.environment["precision"]
    order = torch.randperm(len(train), generator=generator(spec.seed, "recalibrate"))[:count]
    context: AbstractContextManager[object] = nullcontext()
    if spec.attacked:
        plan = run.attack()(train.labels, num_classes=images.num_classes, seed=spec.seed)
        context = poisoned(train, plan, run.stamper())
    with context:
        renew_statistics(model, [train.images[part] for part in order.split(BATCH)], precision)


def load_images(spec: RunSpec, root: str | None) -> ImageSet:
    """The data of a run, from `root` where it is given."""
    return build_dataset(spec if root is None else spec.with_data(root=root)).load()


def show(value: Proportion | None) -> str:
    """A share with its 95% interval."""
    return "–" if value is None else f"{value.value:.2f} [{value.low:.1f}, {value.high:.1f}]"


def main() -> None:
    """Print a Markdown table, one run a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=12_800, help="training images for the statistics")
    args = parser.parse_args()
    loaded: dict[str, ImageSet] = {}
    print("| run | BN | BA % | ASR % | clean images called the target, % |")
    print("| --- | --- | --- | --- | --- |")
    for folder in args.runs:
        run = load_run(folder)
        if run.record.status != "finished":
            continue
        name = run.spec.dataset.name
        if name not in loaded:
            loaded = {name: load_images(run.spec, args.data_root)}
        model = run.model().to(memory_format=torch.channels_last)
        for kind in ("recorded", "fresh"):
            if kind == "fresh":
                renew(run, model, loaded[name], args.images)
            row = measure(run, model, loaded[name])
            cells = [show(row.ba), show(row.asr), show(row.called_target)]
            print(f"| {folder.name} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
