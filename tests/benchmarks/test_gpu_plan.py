"""The plan for a GPU, and the queues: their commands are taken, and their entries are what the plan says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_lines import parse

from backdoorbench_moe.bench.running.queue import read_queue
from backdoorbench_moe.bench.suites.reading import load_suite

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLAN = (BENCHMARKS / "gpu.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```", PLAN, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
MEDIUM = (
    "badpatches-table1",
    "badpatches-table2",
    "dense-baselines",
    "patch-mismatch",
    "precision",
    "warp-variants",
)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("bbmoe ")])
def test_the_commands_of_the_plan_are_taken(line) -> None:
    parse(line)


def test_scripts_and_files_of_the_plan_are_there() -> None:
    scripts = [line.split()[1] for line in COMMANDS if line.startswith("python ")]
    links = re.findall(r"\]\(([^)#]+)\)", PLAN)
    assert scripts and all((BENCHMARKS.parent / name).is_file() for name in scripts)
    assert links and all((BENCHMARKS / name).is_file() for name in links)


def test_the_first_entry_for_a_gpu_is_eight_runs_and_the_next_ones_go_on_from_it() -> None:
    entries = read_queue(BENCHMARKS / "gpu.yaml")
    first, second = entries[0].part, entries[1].part
    assert len(first.runs()) == 8 and len(first.nodes) == 9
    assert {spec.digest for spec in first.nodes} < {spec.digest for spec in second.nodes}
    assert {entry.whole.scale for entry in entries} == {"full"}


@pytest.mark.slow
def test_the_queue_has_the_rates_of_the_medium_scale() -> None:
    entries = [entry for entry in read_queue(BENCHMARKS / "queue.yaml") if entry.scale == "medium"]
    assert {entry.suite for entry in entries} == {*MEDIUM, "removal"}
    for table in MEDIUM[:2]:
        cells = [cell.spec for entry in entries if entry.suite == table for cell in entry.part.cells]
        rates = {(spec.applicator.name, spec.poison.rate) for spec in cells}
        image, patch = (0.001, 0.005, 0.02, 0.1), (0.0001, 0.0005, 0.005, 0.02)
        assert rates == {*(("image", rate) for rate in image), *(("patch", rate) for rate in patch)}
        assert {spec.trigger.name for spec in cells} == {"square", "warp"}
        assert len({spec.digest for spec in cells}) == 16  # the README's cells are named first, and once more
        assert all(entry.part.repeats == 3 for entry in entries if entry.suite == table)


@pytest.mark.parametrize("name", MEDIUM)
def test_medium_is_small_with_all_training_images(name) -> None:
    small, medium = ([cell.spec for cell in load_suite(name, scale).cells] for scale in ("small", "medium"))
    for ours, theirs in zip(medium, small, strict=True):
        assert "train_images" not in ours.dataset.options
        assert (ours.train, ours.model, ours.poison) == (theirs.train, theirs.model, theirs.poison)
        assert ours.train.epochs == 10
