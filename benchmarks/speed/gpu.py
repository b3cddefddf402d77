"""Time of a 25-epoch CIFAR-10 training of the full pMoE on a GPU, and the fastest number of parallel trainings.

    python benchmarks/speed/gpu.py [--side-by-side 1 2 3 4] [--epochs 25] [--images 50000] [--model-size full]
                                   [--device cuda] [--compile] [--peak TFLOPS] [--json FILE]

Trains as `bbmoe attack` does (same step, same precision) on random images of CIFAR-10's size and number, without
reading, evaluating and writing. Parallel trainings are separate processes on the same GPU, which are started first and
then released at the same time. --peak is the GPU's dense bf16 rate, to print the share of it that is reached; it is
known for some GPUs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import wait
from typing import Any

import torch
from common import SMALL_PMOE, at_least_one, environment_of, finish, make_parser, met
from rich.table import Table

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.training.train import Trainer
from backdoorbench_moe.models import create_model
from backdoorbench_moe.models.profile import profile_model

BATCH_SIZE = 128
GOAL_SECONDS = 20.0
MODELS: dict[str, dict[str, Any]] = {"full": {}, "small": SMALL_PMOE}
# Dense bf16 TFLOP/s as stated by the manufacturers.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L4": 121.0, "T4": 65.0}


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--side-by-side", type=at_least_one, nargs="+", default=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--epochs", type=at_least_one, default=25)
    parser.add_argument("--images", type=at_least_one, default=50_000)
    parser.add_argument("--model-size", choices=list(MODELS), default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="use torch.compile inside the CUDA graphs")
    parser.add_argument("--peak", type=float, metavar="TFLOPS")
    arguments = parser.parse_args()
    result = measure(arguments)
    finish(result, make_table(result), notes(result), arguments.json)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time each number of parallel trainings once; a training has 25 epochs, which is enough repetition."""
    device = resolve_device(arguments.device)
    model = create_model("pmoe", num_classes=10, image_size=32, **MODELS[arguments.model_size])
    # A step computes the forward product, and two more of the same size for the gradients of inputs and weights.
    flops = 2 * 3 * profile_model(model, 32).multiply_adds * arguments.images * arguments.epochs
    rows = []
    for count in arguments.side_by_side:
        trainings = train_side_by_side(count, arguments)
        wall = max(training["seconds"] for training in trainings)
        rows.append(
            {
                "side_by_side": count,
                "seconds": wall,
                "seconds_each": [training["seconds"] for training in trainings],
                "set_up_seconds": statistics.median(training["set_up_seconds"] for training in trainings),
                "seconds_a_training": wall / count,
                "images_per_second": count * arguments.images * arguments.epochs / wall,
                "tflops": count * flops / wall / 1e12,
                "peak_bytes_each": max(training["peak_bytes"] for training in trainings),
            }
        )
    return {
        "benchmark": "gpu",
        "model_size": arguments.model_size,
        "images": arguments.images,
        "epochs": arguments.epochs,
        "compiled": arguments.compile,
        "flops": flops,
        "peak_tflops": arguments.peak or known_peak(device),
        "rows": rows,
        "goal_seconds": GOAL_SECONDS,
        "environment": environment_of(arguments.device),
    }


def train_side_by_side(count: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Train in `count` processes that start their clocks at the same time. Exits if one of them fails."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.SimpleQueue()
    options = (
        arguments.model_size,
        arguments.images,
        arguments.epochs,
        arguments.device,
        arguments.compile,
    )
    processes = [
        context.Process(target=train, args=(seed, *options, barrier, results)) for seed in range(count)
    ]
    for process in processes:
        process.start()
    while waiting := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in waiting])
        if any(process.exitcode for process in processes):
            # The others would wait for it forever.
            for process in waiting:
                process.terminate()
            sys.exit(f"error: {count} side by side: a training failed")
    return [results.get() for _ in processes]


def train(
    seed: int,
    size: str,
    images: int,
    epochs: int,
    device_name: str,
    compile: bool,
    barrier: Any,
    results: Any,
) -> None:
    """Time one training, including graph capture and library set-up in its first epoch.

    With `compile`, a training of one epoch is run before the clock starts, as the runs of a suite share compiled code
    within a process.
    """
    began = time.perf_counter()
    device = resolve_device(device_name)
    draw = torch.Generator().manual_seed(seed)
    split = Split(
        torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=draw),
        torch.randint(0, 10, (images,), generator=draw),
    ).to(device)
    if compile:
        make_trainer(seed, size, split, device, epochs=1, compile=True).fit("compile")
    trainer = make_trainer(seed, size, split, device, epochs=epochs, compile=compile)
    set_up = time.perf_counter() - began
    barrier.wait()
    started = time.perf_counter()
    trainer.fit("gpu")
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    results.put({"seconds": seconds, "set_up_seconds": set_up, "peak_bytes": peak})


def make_trainer(
    seed: int, size: str, split: Split, device: torch.device, *, epochs: int, compile: bool
) -> Trainer:
    """Return the trainer of `bbmoe attack`, without checkpoints."""
    torch.manual_seed(seed)
    return Trainer(
        create_model("pmoe", num_classes=10, image_size=32, **MODELS[size]),
        split,
        TrainSpec(epochs=epochs, batch_size=BATCH_SIZE),
        seed=seed,
        device=device,
        precision=resolve_precision("auto", device),
        on_checkpoint=lambda *_: None,
        compile=compile,
    )


def known_peak(device: torch.device) -> float | None:
    """Return the GPU's dense bf16 rate in TFLOP/s; None if it is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per number of parallel trainings."""
    title = f"{result['epochs']} epochs of {result['images']:,} images, {result['model_size']} pmoe"
    table = Table("side by side", title=title, title_justify="left")
    for column in ("seconds", "seconds a training", "images/s", "TFLOP/s", "of the peak", "GB each"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        share = row["tflops"] / result["peak_tflops"] if result["peak_tflops"] else None
        table.add_row(
            str(row["side_by_side"]),
            f"{row['seconds']:.1f}",
            f"{row['seconds_a_training']:.1f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['tflops']:.2f}",
            "–" if share is None else f"{100 * share:.0f}%",
            f"{row['peak_bytes_each'] / 1e9:.2f}",
        )
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Return lines about the fastest number and, if it was measured, about the goal."""
    best = min(result["rows"], key=lambda row: row["seconds_a_training"])
    lines = [f"fastest in total: {best['side_by_side']} side by side"]
    alone = next((row for row in result["rows"] if row["side_by_side"] == 1), None)
    if alone and (result["model_size"], result["images"], result["epochs"]) == ("full", 50_000, 25):
        lines.append(f"goal: {GOAL_SECONDS:g} s for one, {met(alone['seconds'] <= GOAL_SECONDS)}")
    return lines


if __name__ == "__main__":
    main()
