"""Speed and peak memory of stamping and of a training step on images of 32x32, 64x64 and 224x224.

    python benchmarks/speed/larger_images.py [--sides 32 64 224] [--threads N] [--json FILE]

Uses the small pmoe with patches of 4, 8 and 16: square, blend and warp by the patch applicator on 64 images at a time,
and forward, backward and SGD step on batches of 32, in fp32. Every size is measured in a separate process, for its peak
memory. Speed is in images per CPU second in the best of several rounds, to reduce the effect of other work on the
machine.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from common import MAXRSS_UNIT, SMALL_PMOE, at_least_one, environment_of, finish, make_parser
from rich.table import Table

# Image size -> patch size of the model.
PATCHES = {32: 4, 64: 8, 224: 16}
TRIGGERS = ("square", "blend", "warp")
STAMPED, BATCH, ROUNDS = 64, 32, 5


def main() -> None:
    """Measure every size in a child, and print."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--threads", type=at_least_one, default=1, metavar="N", help="threads of each process [1]"
    )
    parser.add_argument("--sides", nargs="+", type=int, choices=PATCHES, default=list(PATCHES), help="[all]")
    parser.add_argument(
        "--here", action="store_true", help="measure the first size in this process and print JSON"
    )
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given.sides[0], threads=given.threads)))
        return
    rows = [_in_child(side, given.threads) for side in given.sides]
    environment = {**environment_of(precision="fp32"), "threads": given.threads}
    result = {"benchmark": "larger_images", "rows": rows, "environment": environment}
    finish(result, make_table(rows), [f"{STAMPED} images stamped, {BATCH} a training step"], given.json)


def _in_child(side: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--here", "--sides", str(side), "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(side: int, *, threads: int) -> dict[str, Any]:
    """Return images per CPU second, and the peak memory of the process after stamping and after training."""
    import torch

    from backdoorbench_moe import create_applicator, create_model, create_trigger
    from backdoorbench_moe.engine.poisoning.poison import stamp_images
    from backdoorbench_moe.models.profile import profile_model

    patch = PATCHES[side]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (STAMPED, 3, side, side), dtype=torch.uint8)
    applicator = create_applicator("patch", patch_size=patch)
    row: dict[str, Any] = {"side": side, "patch": patch, "idle_bytes": _peak_bytes()}
    for name in TRIGGERS:
        trigger = create_trigger(name, **({"size": patch // 2} if name == "square" else {}))
        seconds = _best(lambda trigger=trigger: stamp_images(images, lambda part: applicator(part, trigger)))
        row[name] = STAMPED / seconds
    row["stamp_bytes"] = _peak_bytes()
    model = create_model("pmoe", image_size=side, patch_size=patch, **SMALL_PMOE)
    row["multiply_adds"] = profile_model(model, side).multiply_adds
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch, labels = images[:BATCH].float() / 255, torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()

    row["train"] = BATCH / _best(step)
    row["train_bytes"] = _peak_bytes()
    return row


def _best(work: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest round, after one that is not counted."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def make_table(rows: list[dict[str, Any]]) -> Table:
    """Build a table of images per CPU second, and of peaks in MB above the memory at the start."""
    table = Table(title="Images a CPU second, and peak memory", title_justify="left")
    table.add_column("images, patch")
    for column in (*TRIGGERS, "train", "M MACs", "stamp MB", "train MB"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['side']}x{row['side']}, {row['patch']}x{row['patch']}",
            *(f"{row[name]:,.0f}" for name in (*TRIGGERS, "train")),
            f"{row['multiply_adds'] / 1e6:.1f}",
            *(f"{(row[key] - row['idle_bytes']) / 1e6:,.0f}" for key in ("stamp_bytes", "train_bytes")),
        )
    return table


if __name__ == "__main__":
    main()
