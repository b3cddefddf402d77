"""Training speed of two versions of the toolbox, in turns: of this checkout and of an older one.

    git worktree add --detach ../old COMMIT
    python benchmarks/speed/versions.py ../old [--model small|full] [--rounds 5] [--precision auto|bf16|fp32|avx2]
                                               [--threads 2] [--batches N] [--json FILE]

In each round, each version trains the model for two epochs with `bbmoe attack`, in a process of its own, and the
machine's matrix rate is measured, as in `training.py`. The speed is that of the second epoch, from the run's record.
`--precision avx2` computes in fp32 with the kernels of a CPU without AVX-512.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import AVX2_ONLY, at_least_one, environment_of, finish, make_parser, run_child
from rich.table import Table
from training_loops import (
    BATCH_SIZE,
    IMAGE_SIZE,
    MATRIX,
    MODELS,
    PRODUCTS,
    make_data,
    make_model,
    matrix_loop,
    seconds_of,
)

from backdoorbench_moe.engine.device import resolve_precision
from backdoorbench_moe.models.profile import profile_model

HERE = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout of the older version")
    parser.add_argument("--model", choices=["small", "full"], action="append", help="[both]")
    parser.add_argument("--batches", type=at_least_one, help="batches per epoch [small 20, full 3]")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="number of rounds [5]")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32", "avx2"], default="auto")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads())
    parser.add_argument(
        "--products",
        type=at_least_one,
        default=PRODUCTS,
        help=f"matrix products per round [{PRODUCTS}]",
    )
    arguments = parser.parse_args()
    if not (arguments.old / "backdoorbench_moe" / "__main__.py").is_file():
        parser.error(f"OLD: expected a checkout of this repository, got {arguments.old}")
    if arguments.precision == "avx2" and not AVX2_ONLY.items() <= os.environ.items():
        # The libraries choose their kernels when they are imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2_ONLY)
    torch.set_num_threads(arguments.threads)
    precision = "fp32" if arguments.precision == "avx2" else resolve_precision(arguments.precision, CPU)
    checkouts = {"old": arguments.old.resolve(), "new": HERE}
    models = {
        name: measure(
            name,
            checkouts,
            arguments.batches or MODELS[name].batches,
            arguments.rounds,
            precision,
            arguments.threads,
            arguments.products,
        )
        for name in arguments.model or ["small", "full"]
    }
    result = {
        "benchmark": "versions",
        "commits": {version: commit_of(place) for version, place in checkouts.items()},
        "kernels": "AVX2 only" if arguments.precision == "avx2" else "all",
        "models": models,
        "environment": environment_of("cpu", precision),
    }
    finish(result, make_table(result), [], arguments.json)


def measure(
    name: str,
    checkouts: dict[str, Path],
    batches: int,
    rounds: int,
    precision: str,
    threads: int,
    products: int,
) -> dict[str, Any]:
    """Time both versions and the matrix products in turn, on one model."""
    split, _ = make_data(1, BATCH_SIZE, CPU)
    multiply = matrix_loop(name, split, BATCH_SIZE, CPU, precision, products=products)
    rates: dict[str, list[float]] = {version: [] for version in checkouts}
    matrix = []
    for _ in range(rounds):
        for version, each in rates.items():
            each.append(images_per_second(name, checkouts[version], batches, precision, threads))
        matrix.append(2 * MATRIX**3 * products / seconds_of(multiply, (), CPU) / 1e9)
    flops = 2 * 3 * profile_model(make_model(name, CPU), IMAGE_SIZE).multiply_adds
    speedups = [new / old for old, new in zip(rates["old"], rates["new"], strict=True)]
    shares = {
        version: [flops * rate / 1e9 / machine for rate, machine in zip(each, matrix, strict=True)]
        for version, each in rates.items()
    }
    return {
        "batches": batches,
        "rounds": rounds,
        "images_per_second": {version: statistics.median(each) for version, each in rates.items()},
        "images_per_second_rounds": rates,
        "speedup": statistics.median(speedups),
        "speedup_rounds": speedups,
        "matrix_gflops": statistics.median(matrix),
        "matrix_gflops_rounds": matrix,
        "matrix_share": {version: statistics.median(each) for version, each in shares.items()},
        "matrix_share_rounds": shares,
    }


def images_per_second(name: str, checkout: Path, batches: int, precision: str, threads: int) -> float:
    """Train a model for two epochs with the toolbox in a checkout, and return the speed of the second one."""
    images = batches * BATCH_SIZE
    settings = {
        "dataset.train_images": images,
        "dataset.test_images": 100,
        "train.batch_size": BATCH_SIZE,
        "train.epochs": 2,
        **{f"model.{key}": value for key, value in MODELS[name].options.items()},
    }
    with tempfile.TemporaryDirectory(prefix="bbmoe-versions-") as folder:
        words = ["attack", "--recipe", "paper", "--no-twin", "--quiet", "--output", folder]
        words += [
            "--dataset",
            "signs",
            "--trigger",
            "square",
            "--applicator",
            "image",
            "--poison-rate",
            "10%",
        ]
        words += ["--device", "cpu", "--precision", precision, "--threads", str(threads)]
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        # With -P, the current folder is not searched for the package.
        command = [sys.executable, "-P", "-m", "backdoorbench_moe", *words]
        if run_child(command, quiet=True, variables={"PYTHONPATH": str(checkout)}).returncode:
            sys.exit(f"{checkout}: the training failed: {' '.join(words)}")
        [record] = Path(folder).glob("*/record.json")
        seconds: float = json.loads(record.read_text(encoding="utf-8"))["history"][-1]["seconds"]
    return images / seconds


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per model and version."""
    title = f"Training with two versions, batches of {BATCH_SIZE}, {result['kernels']} kernels"
    table = Table("model", "version", "commit", title=title, title_justify="left")
    for column in ("images/s", "of the matrix rate", "new / old"):
        table.add_column(column, justify="right")
    for name, model in result["models"].items():
        for version, rate in model["images_per_second"].items():
            shares = model["matrix_share_rounds"][version]
            share = f"{model['matrix_share'][version]:.0%} ({min(shares):.0%} – {max(shares):.0%})"
            ratio = f"{model['speedup']:.2f} ({min(model['speedup_rounds']):.2f} – {max(model['speedup_rounds']):.2f})"
            commit = result["commits"][version]
            table.add_row(name, version, commit, f"{rate:,.0f}", share, ratio if version == "new" else "")
    return table


if __name__ == "__main__":
    main()
