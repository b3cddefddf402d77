"""What the README says is run."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from command_lines import parse

from backdoorbench_moe import triggers
from backdoorbench_moe.cli import bbmoe
from backdoorbench_moe.cli.show import read_shown
from backdoorbench_moe.cli.tables.show import markdown_table
from backdoorbench_moe.cli.tables.show_columns import choose_columns
from backdoorbench_moe.records import RunFolder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DETAILS = ROOT / "docs" / "pages" / "benchmarks"
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
BLOCKS = [text for language, text in FENCES if language == "python"]


def test_the_trigger_takes_15_lines_and_works() -> None:
    [example] = [block for block in BLOCKS if "(Trigger)" in block]
    assert len(example.strip().splitlines()) <= 15
    space: dict[str, type] = {}
    exec(compile(example, "README.md", "exec"), space)
    triggers.registry.register("invert")(space["Invert"])
    try:
        images = torch.rand(2, 3, 8, 8)
        torch.testing.assert_close(triggers.create_trigger("invert", strength=1.0)(images), 1 - images)
    finally:
        triggers.registry.unregister("invert")


def commands() -> list[str]:
    """Every `bbmoe` command in a code block of the READMEs, without its comment."""
    pages = [README, (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")]
    fences = [f for page in pages for f in re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]
    lines = [line for text in fences for line in text.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("bbmoe ")]


@pytest.mark.parametrize("line", commands())
def test_the_commands_take_the_flags_they_are_shown_with(line) -> None:
    """Each command is parsed by its own click command; what it would do is tested elsewhere."""
    parse(line)


def test_help_lists_every_command_the_readme_names() -> None:
    result = CliRunner().invoke(bbmoe, ["--help"], prog_name="bbmoe", catch_exceptions=False)
    named = {line.split()[1] for line in commands()}
    assert len(named) >= 5
    assert named <= set(result.output.split())


def test_files_the_readme_points_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing


def test_the_first_look_is_its_records() -> None:
    """The table on the page is what `bbmoe show ... --markdown` draws from the committed records."""
    page = (DETAILS / "first-look.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"<!-- first-look -->\n(.*?)<!-- /first-look -->", page, re.DOTALL)
    folders = sorted(path.parent for path in (ROOT / "benchmarks/results/first-look").glob("*/record.json"))
    runs = [read_shown(folder) for folder in folders]
    assert shown == markdown_table(choose_columns(None, runs, intervals=True), runs) + "\n"


def test_the_results_table_is_the_committed_one() -> None:
    """The cells of Table 1 that were run, as results/ has them (tests/benchmarks holds those to the records)."""
    page = (DETAILS / "attacks.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"<!-- table1 -->\n(.*?)<!-- /table1 -->", page, re.DOTALL)
    drawn = (ROOT / "benchmarks/results/badpatches-table1/small/table.md").read_text(encoding="utf-8")
    asr = drawn.partition("attack success rate (ASR), %\n\n")[2].partition("\n\n")[0].splitlines()
    run = [line for line in asr[2:] if "missing" not in line]
    # "19.1 ± 12.9 (n 3)<br>paper 90.7, −71.6, outside" is two cells of the page: "19.1 ± 12.9 | 90.7".
    cells = [re.sub(r" \(n \d\)<br>paper ([\d.]+)[^|]* \|", r" | \1 |", line) for line in run]
    assert shown.splitlines()[2:] == cells and len(run) > 2


def test_the_small_table_has_the_means_and_deviations_of_the_committed_records() -> None:
    """Whole numbers of table.csv, which knows nothing of the page."""
    [shown] = re.findall(r"<!-- stamping-medium -->\n(.*?)<!-- /stamping-medium -->", README, re.DOTALL)
    with (ROOT / "benchmarks/results/badpatches-table1/medium/table.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "asr"]
    found = {
        (
            row["trigger"].partition(",")[0],
            row["applicator"],
        ): f"{float(row['mean']):.0f} ± {float(row['std']):.0f}"
        for row in rows
        if row["poison_rate_percent"] == "0.5" and row["mean"]
    }
    triggers = list(dict.fromkeys(name for name, _ in found))
    want = [f"| {name} | {found[name, 'image']} | {found[name, 'patch']} |" for name in triggers]
    assert {"square", "warp"} <= {*triggers}
    assert shown.splitlines()[2:] == want


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_demo_printed_what_its_record_holds() -> None:
    [folder] = (ROOT / "benchmarks/results/demo").glob("*-warp-patch-*")
    record = RunFolder(folder).read()
    assert folder.name in README
    for metric in record.metrics.values():
        assert f"│ {metric['value']:.2f} │" in re.sub(r"│ +", "│ ", README)
    assert record.metrics["ba"]["value"] >= 90 and record.metrics["asr"]["value"] >= 90
