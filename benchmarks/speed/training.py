"""Training speed of the toolbox, compared with a plain fp32 training loop and with the machine's matrix rate.

    python benchmarks/speed/training.py [--model small|full|preact_resnet18] [--batches N] [--rounds 5]
                                        [--device cpu] [--precision avx2] [--threads 2] [--compile]
                                        [--profile] [--json FILE]

Both loops train from the same weights on the same random images, in batches of 128. The plain loop is in
`training_loops.py`: float32, PyTorch's default memory format and torch.optim.SGD, with loss and hits read after every
batch. For the small and the full pMoE, it has all images in memory ("plain"); for a PreActResNet-18, it reads and
augments them as BackdoorBench does, in two workers ("loader"), and the toolbox also augments them. The matrix rate is
that of products of 2048x2048 matrices in the toolbox's precision.

Each loop runs in a separate process, in which the C library is set up as for a user: with its defaults for the plain
loop, and as `bbmoe` sets it up for the toolbox. The loops run in turn. `--precision avx2` computes in fp32 with the
kernels of a CPU without AVX-512. The loop "convolutions" computes only the model's convolutions, forward and backward;
no training with these kernels can be faster. `--compile` adds the toolbox's loop with `torch.compile`, which needs a
C++ compiler.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import AVX2_ONLY, at_least_one, environment_of, finish, make_parser
from rich.table import Table
from torch import profiler
from training_loops import (
    BATCH_SIZE,
    IMAGE_SIZE,
    LOOPS,
    MATRIX,
    MODELS,
    PRODUCTS,
    make_data,
    make_model,
    seconds_of,
    toolbox_loop,
    warm_up,
)

from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.models.profile import profile_model
from backdoorbench_moe.process.allocator import keep_freed_memory

PROFILE_ROWS = 25


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), action="append", help="[all]")
    parser.add_argument("--batches", type=at_least_one, help="batches per round [small 20, others 3]")
    parser.add_argument(
        "--batch-size", type=at_least_one, default=BATCH_SIZE, help=f"images per batch [{BATCH_SIZE}]"
    )
    parser.add_argument("--rounds", type=at_least_one, default=5, help="number of rounds [5]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32", "avx2"], default="auto")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads())
    parser.add_argument(
        "--products",
        type=at_least_one,
        default=PRODUCTS,
        help=f"matrix products per round [{PRODUCTS}]",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time the toolbox's loop with torch.compile"
    )
    parser.add_argument("--profile", action="store_true", help="also profile the toolbox's loop")
    arguments = parser.parse_args()
    if arguments.precision == "avx2" and not AVX2_ONLY.items() <= os.environ.items():
        # The libraries choose their kernels when they are imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2_ONLY)
    torch.set_num_threads(arguments.threads)
    names = arguments.model or list(MODELS)
    device = resolve_device(arguments.device)
    precision = "fp32" if arguments.precision == "avx2" else resolve_precision(arguments.precision, device)
    models = {
        name: measure(
            name,
            arguments.batches or MODELS[name].batches,
            arguments.batch_size,
            arguments.rounds,
            device,
            precision,
            products=arguments.products,
            compile=arguments.compile,
        )
        for name in names
    }
    result = {
        "benchmark": "training",
        "batch_size": arguments.batch_size,
        "kernels": "AVX2 only" if arguments.precision == "avx2" else "all",
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "models": models,
        "environment": environment_of(arguments.device, precision),
    }
    finish(result, make_table(result), notes(result), arguments.json)
    if arguments.profile:
        for name in names:
            print_profile(
                name, arguments.batches or MODELS[name].batches, arguments.batch_size, device, precision
            )


def measure(
    name: str,
    batches: int,
    batch_size: int,
    rounds: int,
    device: torch.device,
    precision: str,
    *,
    products: int,
    compile: bool = False,
) -> dict[str, Any]:
    """Time the loops and the matrix products in turn, on one model."""
    profile = profile_model(make_model(name, torch.device("cpu")), IMAGE_SIZE)
    # A step computes the forward product, and two more of the same size for the gradients of inputs and weights.
    flops = 2 * 3 * profile.multiply_adds
    loops = loops_of(name, compile)
    seconds: dict[str, list[float]] = {loop: [] for loop in loops}
    with runner(name, loops, batches, batch_size, device, precision, products) as (run, first):
        for _ in range(rounds):
            for loop, each in seconds.items():
                each.append(run(loop))
    matrix = [2 * MATRIX**3 * products / each / 1e9 for each in seconds.pop("matrix")]
    rates = {loop: [batches * batch_size / each for each in taken] for loop, taken in seconds.items()}
    speedups = _ratios(rates, "toolbox", MODELS[name].beside)
    shares = [flops * ours / 1e9 / machine for ours, machine in zip(rates["toolbox"], matrix, strict=True)]
    goals = MODELS[name].goals(precision)
    found = {"speedup": statistics.median(speedups), "matrix_share": statistics.median(shares)}
    medians = {loop: statistics.median(values) for loop, values in rates.items()}
    return {
        "options": dict(MODELS[name].options),
        "parameters": profile.parameters,
        "multiply_adds": profile.multiply_adds,
        "batches": batches,
        "rounds": rounds,
        "images_per_second": medians,
        "images_per_second_rounds": rates,
        "warm_up_seconds": first,
        "compiled_speedup": statistics.median(_ratios(rates, "compiled", "toolbox")) if compile else None,
        "gflops": {loop: flops * value / 1e9 for loop, value in medians.items()},
        **found,
        "goals": goals,
        "goals_met": all(found[key] >= goal for key, goal in goals.items()),
        "speedup_rounds": speedups,
        "matrix_gflops": statistics.median(matrix),
        "matrix_gflops_rounds": matrix,
        "matrix_share_rounds": shares,
    }


def _ratios(rates: dict[str, list[float]], loop: str, other: str) -> list[float]:
    """Return how many times as fast as another loop one is, in each round."""
    return [one / two for one, two in zip(rates[loop], rates[other], strict=True)]


def loops_of(name: str, compile: bool = False) -> tuple[str, ...]:
    """Return the loops that are timed on a model, as keys of `LOOPS`."""
    return "toolbox", *(["compiled"] if compile else []), MODELS[name].beside, "convolutions", "matrix"


@contextmanager
def runner(
    model: str,
    loops: Sequence[str],
    batches: int,
    batch_size: int,
    device: torch.device,
    precision: str,
    products: int,
) -> Iterator[tuple[Callable[[str], float], dict[str, float]]]:
    """Start a process for each loop; yield a function that runs one of them for a round, and their warm-ups in seconds.

    The function returns the seconds of the round, while the other processes wait.
    """
    context, ends, processes = multiprocessing.get_context("spawn"), {}, []
    first: dict[str, float] = {}
    for loop in loops:
        ends[loop], other = context.Pipe()
        threads = torch.get_num_threads()
        given = (other, loop, model, batches, batch_size, str(device), precision, products, threads)
        processes.append(context.Process(target=serve, args=given))
        processes[-1].start()
        other.close()
        first[loop] = ends[loop].recv()  # One after the other, so that warm-ups do not slow each other down.

    def run(loop: str) -> float:
        ends[loop].send(None)
        seconds: float = ends[loop].recv()
        return seconds

    try:
        yield run, first
    finally:
        for end in ends.values():
            end.close()
        for process in processes:
            process.join()


def serve(
    connection: Any,
    name: str,
    model: str,
    batches: int,
    batch_size: int,
    where: str,
    precision: str,
    products: int,
    threads: int,
) -> None:
    """In a separate process: warm up, then run a round for each message and send its seconds."""
    if name in ("toolbox", "compiled"):
        keep_freed_memory()
    torch.set_num_threads(threads)
    device = torch.device(where)
    split, order = make_data(batches, batch_size, device)
    options = {"products": products} if name == "matrix" else {}
    loop = LOOPS[name](model, split, batch_size, device, precision, **options)
    start = time.perf_counter()
    warm_up(loop, order, device)
    connection.send(time.perf_counter() - start)
    try:
        while True:
            connection.recv()
            connection.send(seconds_of(loop, order, device))
    except EOFError:
        pass


def print_profile(name: str, batches: int, batch_size: int, device: torch.device, precision: str) -> None:
    """Profile one round of the toolbox's loop with torch's profiler."""
    keep_freed_memory()
    split, order = make_data(batches, batch_size, device)
    loop = toolbox_loop(name, split, batch_size, device, precision)
    warm_up(loop, order, device)
    with profiler.profile() as profile:
        loop(order)
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    print(f"\n{name}: {batches} steps")
    print(profile.key_averages().table(sort_by=key, row_limit=PROFILE_ROWS, max_name_column_width=40))


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per model and loop."""
    environment = result["environment"]
    title = (
        f"Training, batches of {result['batch_size']}, {environment['device']}, {result['kernels']} kernels"
    )
    table = Table("model", "loop", title=title, title_justify="left")
    for column in ("images/s", "GFLOP/s", "of the matrix rate", "speed-up"):
        table.add_column(column, justify="right")
    for name, model in result["models"].items():
        ratios = _spread(model, "matrix_share", ".0%"), _spread(model, "speedup", ".2f")
        for loop, rate in model["images_per_second"].items():
            ours, gflops = loop == "toolbox", model["gflops"][loop]
            label = f"{loop}, {'fp32' if loop == MODELS[name].beside else environment['precision']}"
            table.add_row(name, label, f"{rate:,.0f}", f"{gflops:,.0f}", *(ratios if ours else ("", "")))
    return table


def _spread(model: dict[str, Any], key: str, form: str) -> str:
    """Format a median with the lowest and the highest of the rounds."""
    rounds = model[f"{key}_rounds"]
    return f"{model[key]:{form}} ({min(rounds):{form}} – {max(rounds):{form}})"


def notes(result: dict[str, Any]) -> list[str]:
    """Return lines about the models and the goals."""
    lines = []
    for name, model in result["models"].items():
        lines.append(
            f"{name}: {model['parameters']:,} parameters, {model['multiply_adds']:,} multiply-adds an image; "
            f"matrix rate {model['matrix_gflops']:,.0f} GFLOP/s"
        )
        goals = " and ".join(f"{key.replace('_', ' ')} {goal:g}" for key, goal in model["goals"].items())
        if model["compiled_speedup"] is not None:
            lines.append(
                f"{name}: {model['compiled_speedup']:.2f} times as fast with torch.compile, whose first step took "
                f"{model['warm_up_seconds']['compiled']:.0f} s"
            )
        lines.append(f"{name}: goal {goals}: {'met' if model['goals_met'] else 'missed'}")
    return lines


if __name__ == "__main__":
    main()
