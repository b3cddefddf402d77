"""Redraw everything under version control that is drawn from committed records.

    python benchmarks/redraw.py        (or: make results)

These are, from the records alone and without training anything:

- the tables, plots and pages of each results folder (`benchmarks/results/**/suite.json`),
- the leaderboard of the documentation, from the results folders of the suites in `LEADERBOARD`,
- the tables between `<!-- NAME -->` and `<!-- /NAME -->` in README.md and benchmarks/README.md.

Records are never changed. A second call changes nothing. The text around the tables is written by hand:
read it again when numbers or verdicts change.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from backdoorbench_moe.bench.found import relative_link
from backdoorbench_moe.bench.leaderboard import open_board
from backdoorbench_moe.bench.leaderboard_page import leaderboard_page
from backdoorbench_moe.bench.paper import PaperTable
from backdoorbench_moe.bench.render import table_lines
from backdoorbench_moe.bench.results import ResultSet, read_manifest
from backdoorbench_moe.bench.save import redraw_results
from backdoorbench_moe.bench.suite import METRIC_COLUMNS, Layout, Suite
from backdoorbench_moe.bench.suite_file import load_suite
from backdoorbench_moe.bench.tables import build_sheet
from backdoorbench_moe.cli.show import read_shown
from backdoorbench_moe.cli.show_columns import choose_columns
from backdoorbench_moe.cli.show_table import markdown_table
from backdoorbench_moe.cli.tables import metrics_table
from backdoorbench_moe.records import RunFolder

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks") / "results"
PAGES = (Path("README.md"), Path("benchmarks") / "README.md")
LEADERBOARD_PAGE = Path("docs") / "pages" / "assets" / "leaderboard.html"
# Suites of the leaderboard, at their scale small; those of plug-ins by their file.
LEADERBOARD = (
    "standard-attacks",
    "standard-defenses",
    "plugins/bbmoe-vmoe/suites/standard-vmoe.yaml",
    "false-alarms",
    "defenses",
    "plugins/bbmoe-vmoe/suites/transformer-defenses.yaml",
)


def results_folders(root: Path) -> list[Path]:
    """List the results folders below a copy of the repository."""
    return sorted(file.parent for file in (root / RESULTS).rglob("suite.json"))


def suite_of(root: Path, folder: Path) -> Suite:
    """Load the suite of a results folder, which may lie with a plug-in, at its scale and repeats."""
    manifest = read_manifest(folder)
    [file] = [*root.glob(f"plugins/*/suites/{manifest['suite']}.yaml")] or [manifest["suite"]]
    return load_suite(str(file), manifest["scale"]).with_repeats(manifest["repeats"])


def table1(root: Path) -> str:
    """Draw the ASR of Table 1, without rows of which nothing was run."""
    folder = root / RESULTS / "badpatches-table1" / "small"
    sheet = build_sheet(ResultSet.from_folder(suite_of(root, folder), folder))
    [table] = [table for table in sheet.tables if table.metric == "asr"]
    return "".join(f"{line}\n" for line in table_lines(table) if "missing" not in line)


def moevil(root: Path) -> str:
    """Draw what attacks on an expert do to a mixture with the default gate."""
    folder = root / RESULTS / "moevil-gates" / "signs"
    gate = {"gate.name": "top-k", "gate.balance": 0.01, "gate.noise": 1.0}
    metrics = ("alone_asr", "asr", "twin_asr", "overall", "harm_share", "own_share")
    layout = Layout("", ("attack.name",), METRIC_COLUMNS, metrics, no_trigger=False, where=gate)
    results = ResultSet.from_folder(suite_of(root, folder), folder)
    measured = replace(results, suite=replace(results.suite, tables=(layout,)), paper=PaperTable())
    [table] = build_sheet(measured).tables
    return "".join(f"{line}\n" for line in table_lines(table))


def first_look(root: Path) -> str:
    """Draw the runs of the first look as `bbmoe show --markdown` does."""
    folders = sorted(file.parent for file in (root / RESULTS / "first-look").glob("*/record.json"))
    runs = [read_shown(folder) for folder in folders]
    return markdown_table(choose_columns(None, runs, intervals=True), runs) + "\n"


def demo(root: Path) -> str:
    """Draw what `make demo` prints at its end, from the record of such a run."""
    [folder] = (root / RESULTS / "demo").glob("*-warp-patch-*")
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(metrics_table(RunFolder(folder).read()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    shown = "".join(f"{line.rstrip()}\n" for line in lines)
    return f"```\n{shown}run folder: runs/{folder.name}\n```\n"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "table1": table1,
    "moevil": moevil,
    "first-look": first_look,
    "demo": demo,
}


def leaderboard(root: Path) -> str:
    """Draw the leaderboard; suites without results are shown as missing."""
    files = [str(root / name) if name.endswith(".yaml") else name for name in LEADERBOARD]
    suites = [load_suite(name, "small") for name in files]
    board = open_board(suites, runs=root, folders=root / RESULTS)
    options = {"from": RESULTS, "save": LEADERBOARD_PAGE}
    return leaderboard_page(board, LEADERBOARD, relative_link(root / LEADERBOARD_PAGE.parent), options)


def redraw_page(text: str, blocks: dict[str, str]) -> str:
    """Replace the marked tables of a page; other marked parts stay as they are."""

    def redraw(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name} -->\n{blocks[name]}<!-- /{name} -->" if name in blocks else match[0]

    pattern = r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- /(?P=name) -->"
    return re.sub(pattern, redraw, text, flags=re.DOTALL)


def main(root: Path = ROOT) -> None:
    """Redraw all, and print the folders and pages whose content changed."""
    for folder in results_folders(root):
        before = _contents(folder)
        redraw_results(suite_of(root, folder), folder)
        if _contents(folder) != before:
            print(folder.relative_to(root))
    blocks = {name: draw(root) for name, draw in BLOCKS.items()}
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        _replace(root, page, text, redraw_page(text, blocks))
    (root / LEADERBOARD_PAGE.parent).mkdir(parents=True, exist_ok=True)
    text = (root / LEADERBOARD_PAGE).read_text(encoding="utf-8") if (root / LEADERBOARD_PAGE).exists() else ""
    _replace(root, LEADERBOARD_PAGE, text, leaderboard(root))


def _replace(root: Path, page: Path, old: str, new: str) -> None:
    """Write a page and print its name, if its text has changed."""
    if new != old:
        (root / page).write_text(new, encoding="utf-8")
        print(page)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


if __name__ == "__main__":
    main()
