"""Effect of keeping freed memory (`backdoorbench_moe.process.allocator`) on CPU time and page faults.

    python benchmarks/speed/allocator.py [--work NAME ...] [--rounds 5] [--steps 8] [--threads N] [--json FILE]

Three kinds of work, in fp32: training steps of the small pmoe on 64 images of 32x32, training steps of a pmoe on 16
images of 224x224, and predictions of a ResNet-18 for 64 images of 224x224. Each is measured alternately with the C
library's default behaviour and with freed memory kept, in separate processes. CPU seconds include system time, which is
spent on mapping pages.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from common import SMALL_PMOE, at_least_one, environment_of, finish, make_parser
from rich.table import Table

WORK = ("train 32x32", "train 224x224", "predict 224x224")
IMAGES = {"train 32x32": 64, "train 224x224": 16, "predict 224x224": 64}


def main() -> None:
    """Measure in children, in turns, and print."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--threads", type=at_least_one, default=1, metavar="N", help="threads of each process [1]"
    )
    parser.add_argument("--rounds", type=at_least_one, default=5, metavar="N", help="[5]")
    parser.add_argument("--steps", type=at_least_one, default=8, metavar="N", help="steps per round [8]")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="[all]")
    parser.add_argument("--here", choices=WORK, help="measure once in this process and print JSON")
    parser.add_argument("--keep", action="store_true", help="with --here: keep freed memory")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given.here, given.steps, keep=given.keep, threads=given.threads)))
        return
    rows = [compare(name, given.rounds, given.steps, given.threads) for name in given.work]
    environment = {**environment_of(precision="fp32"), "threads": given.threads}
    result = {
        "benchmark": "allocator",
        "rounds": given.rounds,
        "steps": given.steps,
        "rows": rows,
        "environment": environment,
    }
    finish(
        result, make_table(rows), [f"median of {given.rounds} rounds; {given.steps} steps each"], given.json
    )


def compare(name: str, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Measure one kind of work alternately in both ways."""
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for keep in found:
            found[keep].append(_in_child(name, steps, keep, threads))
    ratios = [
        before["cpu_seconds"] / after["cpu_seconds"]
        for before, after in zip(found[False], found[True], strict=True)
    ]
    ways = {
        way: {key: statistics.median(each[key] for each in found[keep]) for key in found[keep][0]}
        for way, keep in (("as_it_is", False), ("kept", True))
    }
    return {"work": name, **ways, "ratio": statistics.median(ratios), "ratios": ratios}


def _in_child(name: str, steps: int, keep: bool, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--here", name, "--steps", str(steps), "--threads", str(threads)]
    command += ["--keep"] if keep else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(name: str, steps: int, *, keep: bool, threads: int) -> dict[str, float]:
    """Return the CPU seconds per step, the system time in them, the page faults per step, and the peak memory."""
    from backdoorbench_moe.process.allocator import keep_freed_memory

    if keep and not keep_freed_memory():
        sys.exit("error: the memory of this C library cannot be kept, or MALLOC_... is set")
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = _step(name)
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = (after.ru_stime - before.ru_stime) / steps
    return {
        "cpu_seconds": (after.ru_utime - before.ru_utime) / steps + system,
        "system_seconds": system,
        "page_faults": (after.ru_minflt - before.ru_minflt) / steps,
        "peak_kib": after.ru_maxrss,
    }


def _step(name: str) -> Callable[[], object]:
    """Return a function that executes one step of a kind of work."""
    import torch

    from backdoorbench_moe import create_model

    side = int(name.rpartition("x")[2])
    images = torch.rand(IMAGES[name], 3, side, side)
    if name.startswith("predict"):
        model = create_model("timm:resnet18", image_size=side).eval()

        def predict() -> None:
            with torch.inference_mode():
                model(images)

        return predict
    sizes = SMALL_PMOE if side == 32 else {**SMALL_PMOE, "patch_size": 16}
    model = create_model("pmoe", image_size=side, **sizes).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.arange(len(images)) % 10

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return train


def make_table(rows: list[dict[str, Any]]) -> Table:
    """Build a table of the CPU milliseconds per image and their ratio."""
    table = Table(title="CPU time with memory as it is, and kept", title_justify="left")
    table.add_column("work")
    for column in ("ms an image", "kept", "ratio", "system", "kept", "peak MB", "kept"):
        table.add_column(column, justify="right")
    for row in rows:
        before, after, images = row["as_it_is"], row["kept"], IMAGES[row["work"]]
        table.add_row(
            row["work"],
            *(f"{1000 * each['cpu_seconds'] / images:.2f}" for each in (before, after)),
            f"{row['ratio']:.2f}",
            *(f"{each['system_seconds'] / each['cpu_seconds']:.0%}" for each in (before, after)),
            *(f"{each['peak_kib'] * 1024 / 1e6:,.0f}" for each in (before, after)),
        )
    return table


if __name__ == "__main__":
    main()
