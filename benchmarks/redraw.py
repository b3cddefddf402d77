"""Redraw all committed files that are drawn from committed records.

    python benchmarks/redraw.py        (or: make results)

Nothing is trained. The files are:

- the tables, plots and pages of each results folder (`benchmarks/results/**/suite.json`),
- the leaderboard of the documentation, from the results folders of the suites in `LEADERBOARD`,
- the tables between `<!-- NAME -->` and `<!-- /NAME -->` in README.md, benchmarks/claims.md and the pages of the
  documentation.

Records are never changed. A second call changes nothing. The text around the tables is written by hand; check it when
numbers or verdicts change.
"""

from __future__ import annotations

import re
from pathlib import Path

from blocks import BLOCKS
from blocks.drawing import RESULTS, suite_of

from backdoorbench_moe.bench.pages.found import relative_link
from backdoorbench_moe.bench.pages.leaderboard import open_board, results_folder
from backdoorbench_moe.bench.pages.leaderboard_page import leaderboard_page
from backdoorbench_moe.bench.save import redraw_results
from backdoorbench_moe.bench.suites.reading import load_suite, split_scale
from backdoorbench_moe.bench.tables.results import with_seeds

ROOT = Path(__file__).parents[1]
DOCS = Path("docs") / "pages"
LEADERBOARD_PAGE = DOCS / "assets" / "leaderboard.html"
# Suites of the leaderboard with their scales; those of plug-ins by file. Scale quick can be run completely on two CPU
# cores; scale small contains the runs on CIFAR-10.
STANDARD = (
    "standard-attacks",
    "attack-groups",
    "standard-defenses",
    "plugins/bbmoe-vmoe/suites/standard-vmoe.yaml",
    "false-alarms",
)
LEADERBOARD = (
    *(f"{name}:quick" for name in STANDARD),
    *(f"{name}:small" for name in STANDARD),
    "defenses:small",
    "plugins/bbmoe-vmoe/suites/transformer-defenses.yaml:small",
)


def results_folders(root: Path) -> list[Path]:
    """List the results folders in a copy of the repository."""
    return sorted(file.parent for file in (root / RESULTS).rglob("suite.json"))


def pages(root: Path) -> list[Path]:
    """List the pages that may have marked tables, relative to a copy of the repository."""
    found = sorted(file.relative_to(root) for file in (root / DOCS).rglob("*.md"))
    return [Path("README.md"), Path("benchmarks") / "claims.md", *found]


def leaderboard(root: Path) -> str:
    """Draw the leaderboard; suites without results are shown as missing."""
    named = [split_scale(name) for name in LEADERBOARD]
    files = [(str(root / name) if name.endswith(".yaml") else name, scale) for name, scale in named]
    loaded = [load_suite(name, scale) for name, scale in files]
    suites = [with_seeds(suite, None, results_folder(suite, root / RESULTS)) for suite in loaded]
    board = open_board(suites, runs=root, folders=root / RESULTS)
    options = {"from": RESULTS, "save": LEADERBOARD_PAGE}
    return leaderboard_page(
        board, [name for name, _ in named], relative_link(root / LEADERBOARD_PAGE.parent), options
    )


def redraw_page(text: str, blocks: dict[str, str]) -> str:
    """Replace the marked tables of a page; other marked parts are not changed."""

    def redraw(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name} -->\n{blocks[name]}<!-- /{name} -->" if name in blocks else match[0]

    pattern = r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- /(?P=name) -->"
    return re.sub(pattern, redraw, text, flags=re.DOTALL)


def main(root: Path = ROOT) -> None:
    """Redraw everything, and print the folders and pages whose content changed."""
    for folder in results_folders(root):
        before = _contents(folder)
        redraw_results(suite_of(root, folder), folder)
        if _contents(folder) != before:
            print(folder.relative_to(root))
    texts = {page: (root / page).read_text(encoding="utf-8") for page in pages(root)}
    blocks = {name: draw(root) for name, draw in BLOCKS.items()}
    for page, text in texts.items():
        _replace(root, page, text, redraw_page(text, blocks))
    (root / LEADERBOARD_PAGE.parent).mkdir(parents=True, exist_ok=True)
    text = (root / LEADERBOARD_PAGE).read_text(encoding="utf-8") if (root / LEADERBOARD_PAGE).exists() else ""
    _replace(root, LEADERBOARD_PAGE, text, leaderboard(root))


def _replace(root: Path, page: Path, old: str, new: str) -> None:
    """Write a page and print its name if its text has changed."""
    if new != old:
        (root / page).write_text(new, encoding="utf-8")
        print(page)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


if __name__ == "__main__":
    main()
