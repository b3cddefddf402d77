"""What several suites have in common, and runs that belong to no suite."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from backdoorbench_moe.bench.pages.claims import claims_tables, judge_all, read_claims
from backdoorbench_moe.cli.show import read_shown
from backdoorbench_moe.cli.tables.runs import metrics_table
from backdoorbench_moe.cli.tables.show import markdown_table
from backdoorbench_moe.cli.tables.show_columns import choose_columns
from backdoorbench_moe.records import RunFolder

from .drawing import RESULTS

CLAIMS = Path("benchmarks") / "claims.yaml"


def claims(root: Path) -> str:
    """Draw the claims of the papers, the verdicts on them, and the commands for their numbers."""
    verdicts = list(judge_all(read_claims(root / CLAIMS), root / RESULTS))
    return claims_tables(verdicts, RESULTS)


def first_look(root: Path) -> str:
    """Draw the runs of the first look as `bbmoe show --markdown` does."""
    folders = sorted(file.parent for file in (root / RESULTS / "first-look").glob("*/record.json"))
    runs = [read_shown(folder) for folder in folders]
    return markdown_table(choose_columns(None, runs, intervals=True), runs) + "\n"


def demo(root: Path) -> str:
    """Draw what `make demo` prints at the end, from the record of such a run."""
    [folder] = (root / RESULTS / "demo").glob("*-warp-patch-*")
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(metrics_table(RunFolder(folder).read()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    shown = "".join(f"{line.rstrip()}\n" for line in lines)
    return f"```\n{shown}run folder: runs/{folder.name}\n```\n"


BLOCKS: dict[str, Callable[[Path], str]] = {"claims": claims, "first-look": first_look, "demo": demo}
