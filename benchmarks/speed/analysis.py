"""Time of the parts of `bbmoe analyze` on a run's test images, and of its report.

    python benchmarks/speed/analysis.py RUN [--data-root DIR] [--threads 2] [--json FILE]

RUN is a finished run folder; the goals are for the small pmoe on CIFAR-10. The run is measured alone, as if it had no
clean twin, and then compared with its twin, if the twin's folder is next to it, which passes all images through a
second model.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import at_least_one, environment_of, finish, make_parser, met
from rich.table import Table

from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.analysis.analyzer import twin_folder
from backdoorbench_moe.analysis.document import as_document
from backdoorbench_moe.analysis.report import draw_report
from backdoorbench_moe.analysis.results import Analysis
from backdoorbench_moe.engine.run import Run, load_run

# For 10,000 test images and the triggered ones among them.
GOAL_SECONDS, GOAL_ROUTING_SECONDS = 60, 15
# Parts of the routing: the pass over all images, and its evaluation.
ROUTING = ("routing", "statistics")


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data-root", metavar="DIR", help="folder with the data set [that of the run]")
    parser.add_argument("--threads", type=at_least_one, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(load_run(arguments.run), arguments.data_root)
    finish(result, make_table(result), notes(result), arguments.json)


def measure(run: Run, data_root: str | None) -> dict[str, Any]:
    """Analyse a run alone and, if available, compared with its clean twin."""
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / run.folder.path.name
        shutil.copytree(run.folder.path, alone)
        rows = {"alone": time_analysis(load_run(alone), data_root)}
    if twin_folder(run) is not None:
        rows["beside its clean twin"] = time_analysis(run, data_root)
    seconds, routing = rows["alone"]["seconds"], sum(rows["alone"]["parts"][part] for part in ROUTING)
    return {
        "benchmark": "analysis",
        "run": run.folder.path.name,
        "model": run.spec.model.to_dict(),
        "rows": rows,
        "routing_seconds": routing,
        "goal_seconds": GOAL_SECONDS,
        "goal_routing_seconds": GOAL_ROUTING_SECONDS,
        "goal_met": seconds <= GOAL_SECONDS and routing <= GOAL_ROUTING_SECONDS,
        "environment": environment_of(run.spec.device, run.spec.precision),
    }


def time_analysis(run: Run, data_root: str | None) -> dict[str, Any]:
    """Time one analysis and its report: wall and CPU seconds, wall seconds of the parts, and numbers of images."""
    started, spent = time.perf_counter(), time.process_time()
    analysis: Analysis = analyze_run(run, data_root=data_root)
    drawing = time.perf_counter()
    draw_report(as_document(analysis))
    now = time.perf_counter()
    parts = {name: value for name, value in analysis.seconds.items() if name != "total"}
    return {
        "seconds": now - started,
        "cpu_seconds": time.process_time() - spent,
        "parts": {**parts, "report": now - drawing},
        "test_images": analysis.images.test,
        "triggered_images": analysis.images.triggered,
    }


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per part."""
    rows = result["rows"]
    images = rows["alone"]["test_images"]
    title = f"bbmoe analyze, {images:,} test images, {rows['alone']['triggered_images']:,} triggered"
    table = Table("seconds", title=title, title_justify="left")
    for name in rows:
        table.add_column(name, justify="right")
    parts = list(dict.fromkeys(part for row in rows.values() for part in row["parts"]))
    for part in parts:
        shown = [row["parts"].get(part) for row in rows.values()]
        table.add_row(part, *("" if value is None else f"{value:.1f}" for value in shown))
    table.add_row("in all, reading included", *(f"{row['seconds']:.1f}" for row in rows.values()))
    table.add_row("CPU, all threads", *(f"{row['cpu_seconds']:.1f}" for row in rows.values()))
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Return a line about the goals."""
    return [
        f"in all, alone: {result['rows']['alone']['seconds']:.1f} s (goal: at most {result['goal_seconds']}); "
        f"routing alone: {result['routing_seconds']:.1f} s (goal: at most {result['goal_routing_seconds']}): "
        + met(result["goal_met"])
    ]


if __name__ == "__main__":
    main()
