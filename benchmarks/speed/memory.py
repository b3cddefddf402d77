"""Peak resident memory of `bbmoe attack` on CIFAR-10, including its clean twin and evaluation.

    python benchmarks/speed/memory.py --data-root DIR [--train-images N] [--json FILE]

Runs the command in a separate process (small pmoe, paper recipe, one epoch, batches of 128 images, warp by the patch
applicator at 10%) and reads its peak from the operating system. The peak of importing the toolbox is measured in the
same way for comparison.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SMALL_PMOE, at_least_one, bbmoe_command, finish, make_parser, run_child, verdict
from rich.table import Table

GOAL_BYTES = 2.5e9
BATCH_SIZE = 128


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--data-root", required=True, metavar="DIR", help="folder with CIFAR-10")
    parser.add_argument(
        "--train-images", type=at_least_one, metavar="N", help="number of training images [all]"
    )
    arguments = parser.parse_args()
    result = measure(arguments.data_root, arguments.train_images)
    finish(result, make_table(result), notes(result), arguments.json)


def measure(data_root: str, train_images: int | None) -> dict[str, Any]:
    """Run the command once. Exits if it fails."""
    with tempfile.TemporaryDirectory() as output:
        child = run_child(attack_command(data_root, train_images, output), quiet=False)
        if child.returncode != 0:
            sys.exit(f"bbmoe attack ended with exit code {child.returncode}")
        records = [json.loads(path.read_text()) for path in sorted(Path(output).glob("*/record.json"))]
    imports = run_child([sys.executable, "-c", "import backdoorbench_moe.engine.runner"], quiet=True)
    victim = next(record for record in records if record["poison"])
    return {
        "benchmark": "memory",
        "goal_bytes": GOAL_BYTES,
        "peak_bytes": child.peak_bytes,
        "import_peak_bytes": imports.peak_bytes,
        "goal_met": child.peak_bytes <= GOAL_BYTES,
        "seconds": child.seconds,
        "train_images": victim["data"]["train_images"],
        "test_images": victim["data"]["test_images"],
        "runs": len(records),
        "spec": {key: victim["spec"][key] for key in ("model", "trigger", "applicator", "poison", "train")},
        "environment": victim["environment"],
    }


def attack_command(data_root: str, train_images: int | None, output: str) -> list[str]:
    """Return the command of `bbmoe attack` with the paper's recipe, for one epoch."""
    settings = [f"model.{name}={value}" for name, value in SMALL_PMOE.items()]
    if train_images is not None:
        settings.append(f"dataset.train_images={train_images}")
    return [
        *bbmoe_command(),
        "attack",
        *("--dataset", "cifar10", "--data-root", data_root, "--recipe", "paper"),
        *("--epochs", "1", "--batch-size", str(BATCH_SIZE), "--device", "cpu", "--output", output),
        *(part for setting in settings for part in ("--set", setting)),
    ]


def make_table(result: dict[str, Any]) -> Table:
    """Build a table of the peaks and the goal."""
    table = Table(title="Peak resident memory", title_justify="left")
    table.add_column("process")
    for column in ("GB", "goal, GB", ""):
        table.add_column(column, justify="right")
    table.add_row("import of the toolbox", f"{result['import_peak_bytes'] / 1e9:.2f}", "", "")
    table.add_row(
        "bbmoe attack, small pmoe",
        f"{result['peak_bytes'] / 1e9:.2f}",
        f"{result['goal_bytes'] / 1e9:.1f}",
        verdict(result["goal_met"]),
    )
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Return a line about the runs."""
    return [
        f"{result['train_images']:,} training and {result['test_images']:,} test images, "
        f"{result['runs']} trainings, {result['seconds']:.0f} s"
    ]


if __name__ == "__main__":
    main()
