"""Training speed of one run with one thread and with one thread per core, on free and on busy cores.

    python benchmarks/speed/threads.py [--rounds 3] [--busy N ...] [--train-images N] [--epochs N] [--json FILE]

Each round measures all combinations of: none, half and all of the cores busy with another process each; one thread, and
one per core; and what a thread does while it waits for the others at the end of an operator: it polls for some time
("spin", the default of the OpenMP library in PyTorch's packages for Linux) or sleeps immediately ("sleep",
`OMP_WAIT_POLICY=PASSIVE`). Images per second are those of the training only, from the run's record.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import at_least_one, bbmoe_command, environment_of, finish, make_parser, run_child
from rich.table import Table

WAITING = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY_LOOP = "while True: pass"


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=3, help="number of rounds [3]")
    parser.add_argument(
        "--busy", type=int, nargs="+", metavar="N", help="numbers of busy cores [none, half and all]"
    )
    parser.add_argument("--train-images", type=at_least_one, default=2000, metavar="N", help="[2000]")
    parser.add_argument("--epochs", type=at_least_one, default=2, help="[2]")
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.busy, arguments.train_images, arguments.epochs)
    finish(result, make_table(result), [], arguments.json)


def measure(rounds: int, busy_cores: list[int] | None, images: int, epochs: int) -> dict[str, Any]:
    """Train with every combination, in turn."""
    cores = os.cpu_count() or 1
    ways = list(itertools.product(busy_cores or sorted({0, cores // 2, cores}), sorted({1, cores}), WAITING))
    speeds: dict[tuple[int, int, str], list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for busy, threads, waiting in ways:
            with busy_processes(busy):
                speed = train(threads, waiting, images, epochs)
            print(
                f"{busy} busy, {threads} threads, {waiting}: {speed:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )
            speeds[busy, threads, waiting].append(speed)
    return {
        "benchmark": "threads",
        "cores": cores,
        "train_images": images,
        "epochs": epochs,
        "rows": [
            {"busy": busy, "threads": threads, "waiting": waiting, "images_per_second": found}
            for (busy, threads, waiting), found in speeds.items()
        ],
        "environment": environment_of("cpu"),
    }


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep some processes busy inside the block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(threads: int, waiting: str, images: int, epochs: int) -> float:
    """Return the images per second of a training in a separate process. Exits if it fails."""
    with tempfile.TemporaryDirectory() as output:
        command = [*bbmoe_command(), "attack", "--trigger", "square", "--no-twin", "--device", "cpu"]
        command += ["--threads", str(threads), "--epochs", str(epochs), "--output", output, "--quiet"]
        command += ["--set", f"dataset.train_images={images}", "--set", "dataset.test_images=100"]
        child = run_child(command, quiet=True, variables=WAITING[waiting])
        if child.returncode != 0:
            sys.exit(f"bbmoe attack ended with exit code {child.returncode}")
        [record] = (json.loads(path.read_text()) for path in Path(output).glob("*/record.json"))
    return float(record["timing"]["images_per_second"])


def make_table(result: dict[str, Any]) -> Table:
    """Build a table of the median of the rounds, with the lowest and the highest."""
    title = f"training a small pmoe on {result['cores']} cores, images/s"
    table = Table("busy cores", "threads", "waiting threads", title=title, title_justify="left")
    table.add_column("images/s", justify="right")
    for row in result["rows"]:
        found = row["images_per_second"]
        text = f"{statistics.median(found):.0f} ({min(found):.0f} – {max(found):.0f})"
        table.add_row(str(row["busy"]), str(row["threads"]), row["waiting"], text)
    return table


if __name__ == "__main__":
    main()
