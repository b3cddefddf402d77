"""Training images/s of the toolbox against a plain eager fp32 loop, in turns in the same run.

    python benchmarks/speed/training.py [--model-size small|full|both] [--batches N] [--rounds 5]
                                        [--device cpu] [--threads 2] [--profile] [--json FILE]

Both train a pMoE from the same weights on the same random images, 128 at a time. The plain loop is what a
researcher would write: float32 images in PyTorch's own memory order, all of them in memory (so no workers
and no decoding), torch.optim.SGD as it comes, loss and hits read after every batch.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import SMALL_PMOE, at_least_one, environment_of, finish, make_parser
from rich.table import Table
from torch import Tensor, nn, profiler
from torch.nn import functional as F

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import reproducible, resolve_device, resolve_precision
from backdoorbench_moe.engine.step import WARMUP_STEPS
from backdoorbench_moe.engine.train import Trainer
from backdoorbench_moe.models import create_model
from backdoorbench_moe.models.profile import profile_model

BATCH_SIZE = 128
IMAGE_SIZE = 32
CLASSES = 10
GOAL = 2.0
MODELS: dict[str, dict[str, Any]] = {"small": SMALL_PMOE, "full": {}}
# Batches timed in a round, so that a round takes seconds on two cores.
BATCHES = {"small": 20, "full": 3}
PROFILE_ROWS = 25

Loop = Callable[[tuple[Tensor, ...]], object]


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--model-size", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--batches", type=at_least_one, help="batches timed in a round [small 20, full 3]")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds of both loops [5]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="then show where the toolbox's time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = list(MODELS) if arguments.model_size == "both" else [arguments.model_size]
    device = resolve_device(arguments.device)
    models = {
        size: measure(size, arguments.batches or BATCHES[size], arguments.rounds, device) for size in sizes
    }
    if (full := models.get("full")) is not None:
        full |= {"goal": GOAL, "goal_met": full["speedup"] >= GOAL}
    result = {
        "benchmark": "training",
        "batch_size": BATCH_SIZE,
        "models": models,
        "environment": environment_of(arguments.device),
    }
    finish(result, make_table(result), notes(result), arguments.json)
    if arguments.profile:
        for size in sizes:
            print_profile(size, arguments.batches or BATCHES[size], device)


def measure(size: str, batches: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time both loops in turns on one model."""
    model = make_model(size, device)
    profile = profile_model(model, IMAGE_SIZE)
    split, order = make_data(batches, device)
    loops = {"toolbox": toolbox_loop(copy.deepcopy(model), split, device), "plain": plain_loop(model, split)}
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        warm_up(loop, order, device)
    for _ in range(rounds):
        for name, loop in loops.items():
            rates[name].append(batches * BATCH_SIZE / seconds_of(loop, order, device))
    speedups = [ours / plain for ours, plain in zip(rates["toolbox"], rates["plain"], strict=True)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # A step computes the forward product, and two more as large for the gradients of inputs and weights.
    flops = 2 * 3 * profile.multiply_adds
    return {
        "options": MODELS[size],
        "parameters": profile.parameters,
        "multiply_adds": profile.multiply_adds,
        "batches": batches,
        "rounds": rounds,
        "images_per_second": medians,
        "images_per_second_rounds": rates,
        "gflops": {name: flops * value / 1e9 for name, value in medians.items()},
        "speedup": statistics.median(speedups),
        "speedup_rounds": speedups,
    }


def print_profile(size: str, batches: int, device: torch.device) -> None:
    """One round of the toolbox's loop under torch's profiler."""
    split, order = make_data(batches, device)
    loop = toolbox_loop(make_model(size, device), split, device)
    warm_up(loop, order, device)
    with profiler.profile() as profile:
        loop(order)
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    print(f"\n{size}: {batches} steps")
    print(profile.key_averages().table(sort_by=key, row_limit=PROFILE_ROWS, max_name_column_width=40))


def make_model(size: str, device: torch.device) -> nn.Module:
    """A pMoE, the same weights at every call."""
    torch.manual_seed(0)
    return create_model("pmoe", num_classes=CLASSES, image_size=IMAGE_SIZE, **MODELS[size]).to(device)


def warm_up(loop: Loop, order: tuple[Tensor, ...], device: torch.device) -> None:
    """Let a GPU capture its graph, after its own warm-up; on a CPU one batch sets up every kernel."""
    loop(order[:1] * (WARMUP_STEPS + 1 if device.type == "cuda" else 1))


def make_data(batches: int, device: torch.device) -> tuple[Split, tuple[Tensor, ...]]:
    """Random images on the device, and the shuffled batches both loops go through."""
    draw = torch.Generator().manual_seed(0)
    count = batches * BATCH_SIZE
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    order = torch.randperm(count, generator=draw).to(device)
    return Split(images, labels).to(device), order.split(BATCH_SIZE)


def toolbox_loop(model: nn.Module, split: Split, device: torch.device) -> Loop:
    """The steps of `engine.train` under the paper's training, without its checkpoints and progress."""
    spec = TrainSpec(batch_size=BATCH_SIZE)
    precision = resolve_precision("auto", device)
    trainer = Trainer(
        model, split, spec, seed=0, device=device, precision=precision, on_checkpoint=lambda *_: None
    )
    model.train()

    def run(order: tuple[Tensor, ...]) -> float:
        with reproducible(device):
            trainer.step.reset()
            for indices in order:
                trainer.step.set_lr(spec.lr)
                trainer.step(indices)
            return float(trainer.step.loss_sum)

    return run


def plain_loop(model: nn.Module, split: Split) -> Loop:
    """An ordinary loop in float32."""
    images, labels = split.images.float() / 255, split.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()

    def run(order: tuple[Tensor, ...]) -> float:
        total, hits = 0.0, 0
        for indices in order:
            x, y = images[indices], labels[indices]
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
            hits += (logits.argmax(1) == y).sum().item()
        return total

    return run


def seconds_of(loop: Loop, order: tuple[Tensor, ...], device: torch.device) -> float:
    """Wall seconds of one round, to the end of its last kernel."""
    start = time.perf_counter()
    loop(order)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make_table(result: dict[str, Any]) -> Table:
    """One row for each model and loop."""
    environment = result["environment"]
    title = f"Training pMoE, batches of {result['batch_size']}, {environment['device']}"
    table = Table("model", "loop", title=title, title_justify="left")
    for column in ("images/s", "GFLOP/s", "speed-up"):
        table.add_column(column, justify="right")
    for size, model in result["models"].items():
        low, high = min(model["speedup_rounds"]), max(model["speedup_rounds"])
        speedup = f"{model['speedup']:.2f}x ({low:.2f} – {high:.2f})"
        for name, precision, last in (("plain", "fp32", ""), ("toolbox", environment["precision"], speedup)):
            rate, gflops = model["images_per_second"][name], model["gflops"][name]
            table.add_row(size, f"{name}, {precision}", f"{rate:,.0f}", f"{gflops:,.0f}", last)
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """What the rows stand for."""
    lines = [
        f"{size}: {model['parameters']:,} parameters, {model['multiply_adds']:,} multiply-adds an image"
        for size, model in result["models"].items()
    ]
    if (full := result["models"].get("full")) is not None:
        lines.append(f"goal at widen factor 10: {full['goal']:g}x, {'met' if full['goal_met'] else 'missed'}")
    return lines


if __name__ == "__main__":
    main()
