"""Training images/s of the toolbox against a plain eager fp32 loop and the machine's own matrix rate, in turns.

    python benchmarks/speed/training.py [--model-size small|full|both] [--batches N] [--rounds 5]
                                        [--device cpu] [--threads 2] [--profile] [--json FILE]

Both train a pMoE from the same weights on the same random images, 128 at a time. The plain loop is what a
researcher would write: float32 images in PyTorch's own memory order, all of them in memory (so no workers
and no decoding), torch.optim.SGD as it comes, loss and hits read after every batch. The matrix rate is that of products
of 2048x2048 matrices in the toolbox's precision. Each loop has a process of its own, in which the C library is set up
as a user has it: as it is for the plain loop, and as `bbmoe` does it for the toolbox.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import SMALL_PMOE, at_least_one, environment_of, finish, make_parser
from rich.table import Table
from torch import Tensor, nn, profiler
from torch.nn import functional as F

from backdoorbench_moe.allocator import keep_freed_memory
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
# Side of the matrices, and products of a round.
MATRIX, PRODUCTS = 2048, 20

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
    """Time the loops and the matrix products in turns, on one model."""
    profile = profile_model(make_model(size, torch.device("cpu")), IMAGE_SIZE)
    # A step computes the forward product, and two more as large for the gradients of inputs and weights.
    flops = 2 * 3 * profile.multiply_adds
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    with runner(size, batches, device) as run:
        for _ in range(rounds):
            for name, each in seconds.items():
                each.append(run(name))
    matrix = [2 * MATRIX**3 * PRODUCTS / each / 1e9 for each in seconds.pop("matrix")]
    rates = {name: [batches * BATCH_SIZE / each for each in found] for name, found in seconds.items()}
    speedups = [ours / plain for ours, plain in zip(rates["toolbox"], rates["plain"], strict=True)]
    shares = [flops * ours / 1e9 / machine for ours, machine in zip(rates["toolbox"], matrix, strict=True)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
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
        "matrix_gflops": statistics.median(matrix),
        "matrix_gflops_rounds": matrix,
        "matrix_share": statistics.median(shares),
        "matrix_share_rounds": shares,
    }


@contextmanager
def runner(size: str, batches: int, device: torch.device) -> Iterator[Callable[[str], float]]:
    """Start a process for each loop and one for matrix products; yield a function that runs one of them for a round.

    It returns the seconds of the round, while the other processes wait.
    """
    context, ends, processes = multiprocessing.get_context("spawn"), {}, []
    for name in LOOPS:
        ends[name], other = context.Pipe()
        given = (other, name, size, batches, str(device), torch.get_num_threads())
        processes.append(context.Process(target=serve, args=given, daemon=True))
        processes[-1].start()
        other.close()
        ends[name].recv()  # One after the other, so that no warm-up disturbs another.

    def run(name: str) -> float:
        ends[name].send(None)
        seconds: float = ends[name].recv()
        return seconds

    try:
        yield run
    finally:
        for end in ends.values():
            end.close()
        for process in processes:
            process.join()


def serve(connection: Any, name: str, size: str, batches: int, where: str, threads: int) -> None:
    """In a process of its own: warm up, then run a round for each message, and send its seconds."""
    if name == "toolbox":
        keep_freed_memory()
    torch.set_num_threads(threads)
    device = torch.device(where)
    split, order = make_data(batches, device)
    loop = LOOPS[name](make_model(size, device), split, device)
    warm_up(loop, order, device)
    connection.send(None)
    try:
        while True:
            connection.recv()
            connection.send(seconds_of(loop, order, device))
    except EOFError:
        pass


def print_profile(size: str, batches: int, device: torch.device) -> None:
    """One round of the toolbox's loop under torch's profiler."""
    keep_freed_memory()
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


def plain_loop(model: nn.Module, split: Split, device: torch.device) -> Loop:
    """An ordinary loop in float32, on the device of the images."""
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


def matrix_loop(_model: nn.Module, _split: Split, device: torch.device) -> Loop:
    """Products of square matrices in the precision that the toolbox computes in; nothing is trained."""
    dtype = torch.bfloat16 if resolve_precision("auto", device) == "bf16" else torch.float32
    one, two = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))

    def run(_: tuple[Tensor, ...]) -> float:
        return sum(float((one @ two)[0, 0]) for _ in range(PRODUCTS))

    return run


LOOPS: dict[str, Callable[[nn.Module, Split, torch.device], Loop]] = {
    "toolbox": toolbox_loop,
    "plain": plain_loop,
    "matrix": matrix_loop,
}


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
    for column in ("images/s", "GFLOP/s", "of the matrix rate", "speed-up"):
        table.add_column(column, justify="right")
    for size, model in result["models"].items():
        for name, precision, last in (
            ("plain", "fp32", ("", "")),
            (
                "toolbox",
                environment["precision"],
                (_spread(model, "matrix_share", ".0%"), _spread(model, "speedup", ".2f")),
            ),
        ):
            rate, gflops = model["images_per_second"][name], model["gflops"][name]
            table.add_row(size, f"{name}, {precision}", f"{rate:,.0f}", f"{gflops:,.0f}", *last)
    return table


def _spread(model: dict[str, Any], key: str, form: str) -> str:
    """A median with the lowest and the highest of the rounds."""
    rounds = model[f"{key}_rounds"]
    return f"{model[key]:{form}} ({min(rounds):{form}} – {max(rounds):{form}})"


def notes(result: dict[str, Any]) -> list[str]:
    """What the rows stand for."""
    lines = [
        f"{size}: {model['parameters']:,} parameters, {model['multiply_adds']:,} multiply-adds an image; "
        f"matrix rate {model['matrix_gflops']:,.0f} GFLOP/s"
        for size, model in result["models"].items()
    ]
    if (full := result["models"].get("full")) is not None:
        lines.append(f"goal at widen factor 10: {full['goal']:g}x, {'met' if full['goal_met'] else 'missed'}")
    return lines


if __name__ == "__main__":
    main()
