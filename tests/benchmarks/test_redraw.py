"""`make results`: what it draws, that it draws the same twice, and that records stay as they are."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.errors import RecordError

ROOT = Path(__file__).parents[2]
FIRST_LOOK = "benchmarks/results/first-look"
DEMO = "benchmarks/results/demo"
TABLE_1 = "benchmarks/results/badpatches-table1/small"
# Pages with a block that is drawn from what `copy` has.
PAGES = {
    "README.md": "demo",
    "docs/pages/benchmarks/attacks.md": "table1",
    "docs/pages/findings.md": "stamping",
}
PLUGIN = "plugins/bbmoe-vmoe/suites"
LEADERBOARD = "docs/pages/assets/leaderboard.html"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("redraw_script", ROOT / "benchmarks" / "redraw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # As when it is called as a script.
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path) -> Path:
    """The parts of the repository that it reads, with one results folder."""
    for name in (FIRST_LOOK, DEMO, TABLE_1, PLUGIN):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in (*PAGES, "benchmarks/claims.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_stale_drawings_are_redrawn_and_a_second_call_changes_nothing(
    script, copy, capsys, monkeypatch
) -> None:
    own = ("table1", "stamping", "first-look", "demo")
    monkeypatch.setattr(script, "BLOCKS", {name: script.BLOCKS[name] for name in own})
    folder = copy / TABLE_1
    records = (folder / "records.jsonl").read_bytes()
    (folder / "table.md").write_text("an older legend\n")
    (folder / "table.tex").unlink()
    (folder / "plots" / "old.svg").write_text("<svg/>")
    for name, block in PAGES.items():
        text = (copy / name).read_text(encoding="utf-8")
        before, mark, after = text.partition(f"<!-- {block} -->\n")
        assert mark
        (copy / name).write_text(f"{before}{mark}| stale |\n{after}", encoding="utf-8")
    script.main(copy)
    assert capsys.readouterr().out.split() == [TABLE_1, *PAGES, LEADERBOARD]
    first = contents(copy)
    # Plots depend on the machine's fonts; everything else is what is committed.
    for name, content in first.items():
        if Path(name).suffix not in (".svg", ".png", ".html"):
            assert content == (ROOT / name).read_bytes(), name
    assert first[f"{TABLE_1}/records.jsonl"] == records
    assert f"{TABLE_1}/plots/old.svg" not in first
    script.main(copy)
    assert capsys.readouterr().out == ""
    assert contents(copy) == first


def test_only_known_marked_tables_are_replaced(script) -> None:
    text = "a\n<!-- table1 -->\nold\n<!-- /table1 -->\nb\n<!-- fresh -->\nkept\n<!-- /fresh -->\n<!-- table1 -->\nx"
    assert script.redraw_page(text, {"table1": "new \\1\n"}) == text.replace("old\n", "new \\1\n")


def test_a_row_of_table_1_is_shown_if_any_of_its_cells_was_run(script, copy) -> None:
    drawn = script.BLOCKS["table1"](copy)
    records = copy / TABLE_1 / "records.jsonl"
    lines = records.read_text(encoding="utf-8").splitlines(keepends=True)
    specs = [json.loads(line)["spec"] for line in lines]
    blend = {"name": "blend", "ratio": 0.5}
    gone = [spec.get("trigger") == blend and spec["applicator"]["name"] == "image" for spec in specs]
    assert sum(gone) == 7
    records.write_text(
        "".join(line for line, out in zip(lines, gone, strict=True) if not out), encoding="utf-8"
    )
    without = script.BLOCKS["table1"](copy)
    assert len(without.splitlines()) == len(drawn.splitlines()) == 2 + 6
    assert without.count("| – |") == 3 and "| image | 0.5% | 19.1 ± 12.9 | 90.7 | – | 99.6 |" in without


@pytest.mark.parametrize("name", ["table1", "table1-medium", "table2", "moevil", "texts"])
def test_a_cell_of_these_tables_has_a_mean_and_its_deviation_only(script, name) -> None:
    _, rule, *rows = script.BLOCKS[name](ROOT).splitlines()
    labels = rule.count(" ---")
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")[labels:]]
    assert cells and all(re.fullmatch(r"–|\d+\.\d( ± \d+\.\d)?", cell) for cell in cells)


def test_small_tables_mark_models_near_chance(script) -> None:
    whole_text = sys.modules["blocks.drawing"].whole_text
    assert whole_text(Statistic.of({0: 100.0}, near_chance=1)) == "100†"
    assert whole_text(Statistic.of({0: 90.0, 1: 94.0}, near_chance=1)) == "92 ± 3†"
    assert whole_text(Statistic.of({0: 90.0, 1: 94.0})) == "92 ± 3"


@pytest.mark.slow
def test_the_committed_tables_of_all_pages_are_those_of_the_committed_records(script) -> None:
    blocks = {name: draw(ROOT) for name, draw in script.BLOCKS.items()}
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in script.pages(ROOT)]
    assert [script.redraw_page(text, blocks) for text in texts] == texts
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in blocks)


@pytest.mark.slow
def test_every_committed_folder_has_its_suite(script) -> None:
    folders = script.results_folders(ROOT)
    assert len(folders) >= 10
    for folder in folders:
        assert script.suite_of(ROOT, folder).cells


def test_a_folder_of_another_suite_is_refused_untouched(script, copy) -> None:
    manifest = copy / TABLE_1 / "suite.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99'))
    before = contents(copy)
    with pytest.raises(RecordError, match="is of version 99"):
        script.main(copy)
    assert contents(copy) == before


@pytest.mark.slow
def test_the_committed_leaderboard_is_that_of_the_committed_records(script) -> None:
    assert script.leaderboard(ROOT) == (ROOT / LEADERBOARD).read_text(encoding="utf-8")
