"""Effect of slow batch norm: BA and ASR of finished runs, as recorded and with recomputed BN statistics.

The target rate without the trigger is shown next to them (for a clean run, that of class 0): the ASR that the model
would have without any trigger.

The running statistics of the reference's BN have a momentum of 0.01. At a constant learning rate of 0.1, they lag
behind the weights. Training never reads them, so recomputing them as averages over the run's own (poisoned) training
images gives the model that a faster BN would have had, without retraining.

    python benchmarks/recalibrate.py runs/*/ --data-root DIR [--images 12800]
"""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from backdoorbench_moe.attacks import create_attack
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine.build import build_dataset
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.measuring.evaluate import Metrics, measure
from backdoorbench_moe.engine.poisoning.poison import poisoned
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.ops.seeding import generator

BATCH = 128


def renew_statistics(model: nn.Module, batches: list[torch.Tensor], precision: str) -> None:
    """Replace the running statistics of every BN by their mean over `batches` of (B, 3, H, W) uint8 images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # The mean over the batches.
    model.train()
    with torch.no_grad():
        for images in batches:
            forward(model, images, precision=precision)


def measure_run(run: Run, model: nn.Module, images: ImageSet) -> Metrics:
    """Evaluate a model of a run on the test images of `images`.

    Returns:
        `ba`, `asr` and `target_rate` (see `engine.measuring.evaluate.measure`). A clean run has no `asr`; its
        `target_rate` is that of an attack on class 0.
    """
    precision = run.record.environment["precision"]
    attack = run.attack() if run.spec.attacked else create_attack("data-poisoning")
    triggered = triggered_test(images, attack, run.stamper() if run.spec.trigger is not None else None)
    metrics = measure(model, images.test, triggered, precision=precision)
    if not run.spec.attacked:
        del metrics["asr"]
    return metrics


def renew(run: Run, model: nn.Module, images: ImageSet, count: int) -> None:
    """Recompute the model's BN statistics on `count` of the run's own (poisoned) training images."""
    spec, train, precision = run.spec, images.train, run.record.environment["precision"]
    order = torch.randperm(len(train), generator=generator(spec.seed, "recalibrate"))[:count]
    context: AbstractContextManager[Split] = nullcontext(train)
    if spec.attacked:
        plan = run.attack()(train.labels, num_classes=images.num_classes, seed=spec.seed)
        context = poisoned(train, plan, run.stamper())
    # Images that are not in memory are stamped in what the block returns.
    with context as split:
        renew_statistics(model, [split.images[part] for part in order.split(BATCH)], precision)


def load_images(spec: RunSpec, root: str | None) -> ImageSet:
    """Load the data of a run, from `root` if given."""
    return build_dataset(spec if root is None else spec.with_data(root=root)).load()


def show(metrics: Metrics, name: str) -> str:
    """Format a metric with its 95% interval; "–" if it was not measured."""
    found = metrics.get(name)
    return "–" if found is None else f"{found['value']:.2f} [{found['low']:.1f}, {found['high']:.1f}]"


def main() -> None:
    """Print a Markdown table with two rows per run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=12_800, help="training images for the statistics")
    args = parser.parse_args()
    loaded: dict[str, ImageSet] = {}
    print("| run | BN | BA % | ASR % | target rate without the trigger, % |")
    print("| --- | --- | --- | --- | --- |")
    for folder in args.runs:
        run = load_run(folder)
        if run.record.status != "finished":
            continue
        # Runs on the same data set may have other options, such as the number of training images.
        name = json.dumps(run.spec.dataset.to_dict(), sort_keys=True)
        if name not in loaded:
            loaded = {name: load_images(run.spec, args.data_root)}
        model = run.model().to(memory_format=torch.channels_last)
        for kind in ("recorded", "fresh"):
            if kind == "fresh":
                renew(run, model, loaded[name], args.images)
            metrics = measure_run(run, model, loaded[name])
            cells = [show(metrics, key) for key in ("ba", "asr", "target_rate")]
            print(f"| {folder.name} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
