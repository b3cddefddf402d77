"""What is committed under benchmarks/results is what its records and today's suites make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backdoorbench_moe.bench.suites.reading import load_suite
from backdoorbench_moe.bench.tables import render
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.tidy import tidy_csv

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.rglob("suite.json"))


def test_there_are_results() -> None:
    assert FOLDERS


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(RESULTS)))
def test_the_committed_tables_are_the_records(folder) -> None:
    manifest = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    # A suite need not have scales.
    names = tuple(name for name in (manifest["suite"], manifest["scale"]) if name is not None)
    assert folder.relative_to(RESULTS).parts == names
    # A plug-in's suites lie with it.
    [file] = [*ROOT.glob(f"plugins/*/suites/{names[0]}.yaml")] or [names[0]]
    suite = load_suite(str(file), manifest["scale"]).with_repeats(manifest["repeats"])
    results = ResultSet.from_folder(suite, folder)
    assert results.finished()
    sheet = build_sheet(results)
    drawn = {
        "table.md": render.markdown(sheet),
        "table.csv": render.statistics_csv(results),
        "table.tex": render.latex(sheet),
        "tidy.csv": tidy_csv(results),
    }
    for name, text in drawn.items():
        assert (folder / name).read_bytes() == text.encode("utf-8"), f"{folder.name}: {name}"
