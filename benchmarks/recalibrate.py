"""What slow batch norm costs: BA and ASR of finished runs, as recorded and with fresh BN statistics.

The reference's BN follows the batches at 0.01 a step; at a constant learning rate of 0.1 the running
statistics lag behind the weights. Training never reads them, so averaging them anew over the run's own
(poisoned) training images gives the model that a faster BN would have had, without training again.

    python benchmarks/recalibrate.py runs/*/ --data-root DIR [--images 12800]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.evaluate import count_hits
from backdoorbench_moe.engine.poison import apply_plan, plan_poison, triggered_test
from backdoorbench_moe.engine.runner import Run, load_run
from backdoorbench_moe.engine.step import as_input
from backdoorbench_moe.ops.metrics import Proportion, proportion
from backdoorbench_moe.ops.seeding import generator

BATCH = 128


@dataclass(frozen=True)
class Fresh:
    """Metrics of a run with fresh BN statistics; `asr` is None for a clean one."""

    ba: Proportion
    asr: Proportion | None


def renew_statistics(model: nn.Module, batches: list[torch.Tensor], precision: str) -> None:
    """Replace every BN's running statistics by the mean over `batches` of (B, 3, H, W) uint8 images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # A plain average over the batches.
    model.train()
    with torch.no_grad(), autocast(batches[0].device, precision):
        for images in batches:
            model(as_input(images))


def measure(run: Run, images: ImageSet, count: int) -> Fresh:
    """BA and ASR of a finished run after its BN saw `count` of its own training images again."""
    spec, model = run.spec, run.model().to(memory_format=torch.channels_last)
    precision = run.record.environment["precision"]
    train = images.train
    if not spec.is_clean:
        plan = plan_poison(train.labels, spec.poison, images.num_classes, spec.seed)
        train = apply_plan(train, plan, run.stamper())
    order = torch.randperm(len(train), generator=generator(spec.seed, "recalibrate"))[:count]
    renew_statistics(model, [train.images[part] for part in order.split(BATCH)], precision)
    ba = proportion(count_hits(model, images.test, precision=precision), len(images.test))
    if spec.is_clean:
        return Fresh(ba, None)
    triggered, _ = triggered_test(images, spec.poison, run.stamper())
    return Fresh(ba, proportion(count_hits(model, triggered, precision=precision), len(triggered)))


def load_images(spec: RunSpec, root: str | None) -> ImageSet:
    """The data of a run, from `root` where it is given."""
    options = dict(spec.dataset.options)
    if root is not None:
        options["root"] = root
    return create_dataset(spec.dataset.name, **options).load()


def show(value: Proportion | dict[str, float] | None) -> str:
    """A share with its 95% interval."""
    if value is None:
        return "–"
    row = value if isinstance(value, dict) else asdict(value)
    return f"{row['value']:.2f} [{row['low']:.1f}, {row['high']:.1f}]"


def main() -> None:
    """Print a Markdown table, one run a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=12_800, help="training images for the statistics")
    args = parser.parse_args()
    loaded: dict[str, ImageSet] = {}
    print("| run | BA %, recorded | BA %, fresh BN | ASR %, recorded | ASR %, fresh BN |")
    print("| --- | --- | --- | --- | --- |")
    for folder in args.runs:
        run = load_run(folder)
        if run.record.status != "finished":
            continue
        name = run.spec.dataset.name
        if name not in loaded:
            loaded = {name: load_images(run.spec, args.data_root)}
        fresh, metrics = measure(run, loaded[name], args.images), run.record.metrics
        cells = [show(metrics["ba"]), show(fresh.ba), show(metrics.get("asr")), show(fresh.asr)]
        print(f"| {folder.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
