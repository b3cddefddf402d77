"""How far the variances of batch norms are from those of training, for images that suit a model and for others.

    python benchmarks/suitability.py RUNS ... --data-root DIR

The limit of `bbmoe audit` for images that do not suit a model (`auditing/suitability.py`) was set from this table. RUNS
are folders of run folders of models trained on CIFAR-10.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from backdoorbench_moe import create_dataset, load_run
from backdoorbench_moe.auditing.subject import make_subject
from backdoorbench_moe.auditing.suitability import LARGEST_RATIO, variance_ratio


def main() -> None:
    """Measure and print the lowest and the highest ratio over the models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of run folders")
    parser.add_argument("--data-root", type=str, required=True, help="folder with CIFAR-10")
    arguments = parser.parse_args()
    images = kinds(create_dataset("cifar10", root=arguments.data_root).load().test.images)
    found: dict[str, list[float]] = {name: [] for name in images}
    for folder in sorted(path for runs in arguments.runs for path in runs.iterdir()):
        run = load_run(folder)
        if run.record.status != "finished":
            continue
        model = run.model()
        for name, each in images.items():
            if (ratio := variance_ratio(make_subject(model, images=each))) is not None:
                found[name].append(ratio)
    print(f"limit: {LARGEST_RATIO}; models: {len(found['noise'])}")
    for name, ratios in found.items():
        if ratios:
            print(f"{name}: {min(ratios):.2f} to {max(ratios):.2f}")


def kinds(images: Tensor) -> dict[str, Tensor]:
    """Return test images (N, 3, H, W) uint8, and images that do not suit the model, by name."""
    some = images[:100].float()
    noise = torch.randint(0, 256, some.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {
        "20 test images": images[:20],
        "100 test images": images[:100],
        "500 test images": images[:500],
        "noise": noise,
        "half the contrast": (some / 2 + 127).byte(),
        "3x3 box blur": avg_pool2d(some, 3, 1, 1).byte(),
    }


if __name__ == "__main__":
    main()
