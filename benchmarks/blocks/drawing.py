"""Small tables of a suite's committed records for the text of pages: whole numbers, one fact in each cell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.bench.suites.paper import PaperTable
from backdoorbench_moe.bench.suites.reading import load_suite
from backdoorbench_moe.bench.suites.suite import Cell, Layout, Suite
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.results import ResultSet, read_manifest
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.bench.tables.wording import key_name, number
from backdoorbench_moe.collapse import MARK

RESULTS = Path("benchmarks") / "results"
BY_APPLICATOR = Layout("", ("trigger.name",), "applicator.name", no_trigger=False)
# Labels of tables in the pages of findings.
NAMES = {
    "image": "on the image",
    "patch": "in every patch",
    "fine-pruning, ratio=0.2, clean_fraction=1.0, epochs=5": "pruned, tuned on all images",
    "fine-pruning, ratio=0.2, clean_fraction=1.0, epochs=5, finetune_data=notebook": "the same, as in the notebook",
    "fine-pruning, ratio=0.2, clean_fraction=0.05, epochs=5": "pruned, tuned on 5% of the images",
    "timm:vit_tiny_patch16_224": "dense transformer",
    "fine-tuning": "fine-tuning, 5 epochs",
    "fine-tuning, epochs=20": "fine-tuning, 20 epochs",
    "fine-tuning, epochs=40": "fine-tuning, 40 epochs",
    "tile-tuning": "tile-tuning, 40 epochs",
    "fine-tuning, epochs=80": "fine-tuning, 80 epochs",
    "fine-tuning, epochs=240": "fine-tuning, 240 epochs",
    "tile-distillation": "tile-distillation, 240 epochs",
    "tile-distillation, epochs=80": "tile-distillation, 80 epochs",
    "tile-distillation, share=0": "distillation without tiles",
    "fine-tuning, epochs=40, lr=0.01": "the same with lr=0.01",
    "tile-tuning, lr=0.01": "the same with lr=0.01",
    "neural-cleanse, applicator=patch": "Neural Cleanse in all tiles, 20 epochs",
}


def suite_of(root: Path, folder: Path) -> Suite:
    """Load the suite of a results folder, which may belong to a plug-in, at its scale and repeats."""
    manifest = read_manifest(folder)
    [file] = [*root.glob(f"plugins/*/suites/{manifest['suite']}.yaml")] or [manifest["suite"]]
    return load_suite(str(file), manifest["scale"]).with_repeats(manifest["repeats"])


def results_of(root: Path, folder: Path) -> ResultSet:
    """Read the suite and the records of a results folder; once for all tables that are drawn from the same files."""
    files = [folder / name for name in ("suite.json", "records.jsonl")]
    return _read(root, folder, tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@functools.cache
def _read(root: Path, folder: Path, _state: tuple[tuple[int, int], ...]) -> ResultSet:
    return ResultSet.from_folder(suite_of(root, folder), folder)


def whole_table(
    root: Path, place: str, layout: Layout, rows: Sequence[str] = (), *, names: Mapping[str, str] = NAMES
) -> str:
    """Draw a small table of integers: means, with their standard deviation over the seeds if there are several.

    Args:
        root: A copy of the repository.
        place: The results folder, relative to the folder of all results.
        layout: The table; published values are not shown.
        rows: First labels of the rows to show; if empty, all rows with a finished run.
        names: Texts for the labels of columns.
    """
    folder = root / RESULTS / place
    results = results_of(root, folder)
    measured = replace(results, suite=replace(results.suite, tables=(layout,)), paper=PaperTable())
    [table] = build_sheet(measured).tables
    head = [*map(key_name, table.row_keys), *(names.get(name, name) for name in table.columns)]
    lines = [head, ["---"] * len(table.row_keys) + ["--:"] * len(table.columns)]
    cells = [*zip(table.rows, table.places, strict=True)]
    if layout.rows == ("poison.rate",):
        cells.sort(key=lambda row: float(row[0][0].rstrip("%")))
    for labels, places in cells:
        texts = [whole_text(each.statistic) for each in places]
        if (not rows or labels[0] in rows) and any(each.statistic for each in places):
            lines.append([*(NAMES.get(text, text) for text in labels), *texts])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return the rows of a table as Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def whole_text(found: Statistic | None, digits: int = 0) -> str:
    """Format a mean and its standard deviation, as integers by default.

    A mark follows if the model of any seed is near chance.
    """
    if found is None:
        return "–"
    spread = "" if found.std is None else f" ± {number(found.std, digits)}"
    return f"{number(found.mean, digits)}{spread}{MARK if found.near_chance else ''}"


def crossed(root: Path, place: str, head: str, row: Callable[[Cell], str], metric: str) -> str:
    """Draw a metric with one column for each model and applicator.

    Args:
        root: A copy of the repository.
        place: The results folder, relative to the folder of all results.
        head: What the rows are.
        row: Returns the name of a cell's row.
        metric: Key of the metric.
    """
    folder = root / RESULTS / place
    results = results_of(root, folder)
    rows: dict[str, dict[str, str]] = {}
    for cell in results.suite.cells:
        assert cell.spec.applicator is not None
        model = NAMES.get(cell.spec.model.name, cell.spec.model.name)
        texts = rows.setdefault(NAMES.get(row(cell), row(cell)), {})
        texts[f"{model}, {cell.spec.applicator.name}"] = whole_text(results.statistic(cell, metric))
    columns = sorted(dict.fromkeys(column for texts in rows.values() for column in texts), key=_model_first)
    lines = [[head, *columns], ["---", *["--:"] * len(columns)]]
    return markdown([*lines, *([name, *(texts.get(c, "") for c in columns)] for name, texts in rows.items())])


def _model_first(column: str) -> tuple[int, str]:
    models = ("pmoe", "wide_resnet", "vmoe", "soft-moe")
    model = column.rpartition(", ")[0]
    return (models.index(model) if model in models else len(models)), column


def small_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown; all columns except the first two are numbers."""
    return markdown([names, ["---"] * 2 + ["--:"] * (len(names) - 2), *rows])
