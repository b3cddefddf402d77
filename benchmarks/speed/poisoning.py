"""Time to stamp 10,000 images of 32x32, uint8 to uint8, for each trigger and applicator.

    python benchmarks/speed/poisoning.py [--images 10000] [--threads 2] [--device cpu] [--json FILE]

For comparison, WaNet's formula is applied to one image at a time, as data set transforms do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import at_least_one, environment_of, finish, make_parser
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.applicators import create_applicator, list_applicators
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.triggers import create_trigger, list_triggers, registry
from backdoorbench_moe.triggers.base import Trigger
from backdoorbench_moe.triggers.learned import LearnedTrigger
from backdoorbench_moe.triggers.warp import Warp

REPEATS = 5
LOOP_IMAGES = 500
# Goals: seconds for 10,000 images, and speed-up of the batched warp over the loop.
GOAL_SECONDS, GOAL_SPEEDUP = 0.3, 100
NOTEBOOK: dict[str, object] = {"grid_size": 2, "strength": 0.25, "sampling": "truncate"}


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=at_least_one, default=10_000)
    parser.add_argument("--threads", type=at_least_one, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.images, 3, 32, 32)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = measure(images.to(arguments.device))
    result["environment"] = environment_of(arguments.device)
    finish(result, make_table(result), notes(result), arguments.json)


def measure(images: Tensor) -> dict[str, Any]:
    """Time every trigger with every applicator, and the loop; learned triggers have no pattern and are left out."""
    names = [name for name in list_triggers() if not issubclass(registry.lookup(name), LearnedTrigger)]
    variants: dict[str, Trigger] = {name: create_trigger(name) for name in names}
    variants["warp (truncate)"] = create_trigger("warp", **NOTEBOOK)
    seconds = {}
    for label, trigger in variants.items():
        for place in list_applicators():
            run = partial(stamp_images, images, partial(create_applicator(place), trigger=trigger))
            seconds[f"{label}, {place}"] = median_seconds(run, images.device)
    few = images[:LOOP_IMAGES]
    loop = len(few) / median_seconds(lambda: warp_one_by_one(few, Warp()), images.device)
    return {
        "benchmark": "poisoning",
        "images": len(images),
        "goal_seconds": GOAL_SECONDS,
        "goal_speedup": GOAL_SPEEDUP,
        "seconds": seconds,
        "loop_images_per_second": loop,
        "warp_speedup_over_loop": len(images) / seconds["warp, image"] / loop,
    }


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds over the repeats, after a warm-up run."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def warp_one_by_one(images: Tensor, warp: Warp) -> Tensor:
    """Apply WaNet's formula, starting from the control grid, to each image separately."""
    size, device = images.shape[-1], images.device
    control = warp.control_grid.to(device)
    warped = []
    for image in images:
        field = F.interpolate(control, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        axis = torch.linspace(-1, 1, size, device=device)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        grid = (torch.stack((x, y), 2)[None] + warp.strength * field / size).clamp(-1, 1)
        pixels = F.grid_sample(image[None].float() / 255, grid, align_corners=True)
        warped.append((pixels[0] * 255).round().to(torch.uint8))
    return torch.stack(warped)


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per trigger and applicator."""
    environment = result["environment"]
    title = f"Stamping {result['images']:,} images, {environment['threads']} threads, {environment['device']}"
    table = Table("trigger, applicator", title=title, title_justify="left")
    for column in ("seconds", "images/s"):
        table.add_column(column, justify="right")
    for name, seconds in result["seconds"].items():
        table.add_row(name, f"{seconds:.3f}", f"{result['images'] / seconds:,.0f}")
    loop = result["loop_images_per_second"]
    table.add_row("warp, image, one by one", f"{result['images'] / loop:.3f}", f"{loop:,.0f}")
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Return lines about the slowest trigger and the speed-up, with their goals."""
    slowest = max(result["seconds"].values()) * 10_000 / result["images"]
    return [
        f"slowest for 10,000 images: {slowest:.3f} s (goal: at most {result['goal_seconds']:g})",
        f"warp, batched over one by one: {result['warp_speedup_over_loop']:.0f}x "
        f"(goal: at least {result['goal_speedup']:g}x)",
    ]


if __name__ == "__main__":
    main()
