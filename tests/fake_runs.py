"""Run folders of runs that nobody trained: valid records with chosen numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from backdoorbench_moe.bench.suites.reading import parse_suite
from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.ops.metrics import proportion
from backdoorbench_moe.records import Record, RunFolder

ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "packages": {"backdoorbench-moe": "0.1.0", "torch": "2.15.0"},
    "device": "cpu",
    "cpu": "A CPU",
    "threads": 2,
    "precision": "bf16",
    "git_commit": "fb42750d6975",
}
PAPER = {"file": "badpatches_tables_1_2", "table": 1}
PART = {
    "title": "Part of Table 1",
    "version": 3,
    "base": {"recipe": "paper", "dataset": "cifar10"},
    "grid": {
        "applicator": ["image", "patch"],
        "trigger": ["square", "warp"],
        "poison.rate": ["0.5%", "10%"],
    },
    "repeats": 2,
    "paper": PAPER,
    "tables": [
        {
            "title": "CIFAR-10",
            "rows": ["applicator.name", "poison.rate"],
            "columns": "trigger.name",
            "metrics": ["asr", "cad"],
        }
    ],
    "plots": [{"title": "ASR over the poisoning rate"}],
}


def part_suite(name: str = "part", **changes: Any) -> Suite:
    """Eight cells of the paper's Table 1; any key may be given anew."""
    return parse_suite({**PART, **changes}, name, None)


def finished(
    spec: RunSpec, *, ba: int = 8000, asr: int | None = 4500, data: str = "d" * 64, **environment: Any
) -> Record:
    """A finished record: `ba` of 10,000 images right, `asr` of 9,000 fooled."""
    record = Record.for_spec(spec)
    record.status = "finished"
    record.metrics = {"ba": asdict(proportion(ba, 10000))}
    if asr is not None and spec.attacked:
        record.metrics["asr"] = asdict(proportion(asr, 9000))
    record.data = {"name": spec.dataset.name, "digest": data, "classes": ["a", "b"], "image_size": 32}
    record.environment = {**ENVIRONMENT, **environment}
    record.timing = {"train_seconds": 60.5, "images_per_second": 820.25}
    record.history = [
        {"epoch": n + 1, "loss": 1.0, "train_accuracy": 50.0, "lr": 0.1, "seconds": 2.0}
        for n in range(spec.train.epochs)
    ]
    return record


def write(output: Path, record: Record) -> None:
    """Write a record where a suite looks for it."""
    folder = RunFolder(output / record.run_spec.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write(record)


def fill(suite: Suite, output: Path, *, shift: int = 0, repeats: int | None = None) -> None:
    """Write finished runs for all cells of a suite but its last; numbers differ by cell and seed."""
    for number, cell in enumerate(suite.cells[:-1]):
        for spec in cell.runs(repeats or suite.repeats):
            asr = min(9000, 1000 * number + 300 * spec.seed + shift)
            write(output, finished(spec, ba=8000 - 10 * number - spec.seed, asr=asr))
            write(output, finished(clean_twin(spec), ba=8200 + 5 * spec.seed))
