"""What `make docs` makes: pictures of triggers, tables from records, and links to copies."""

from __future__ import annotations

import importlib.util
import json
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.triggers import create_trigger

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_of_every_trigger_that_is_not_learned_and_differ_from_the_clean_one(hooks) -> None:
    found = hooks.pictures()
    names = {name for name, _ in found}
    assert {"square", "blend", "warp", "sig"} <= names
    assert names | set(hooks.learned().replace("`", "").split(", ")) == set(hooks.shown_triggers())
    clean = hooks.clean_image()
    same = [key for key, image in found.items() if (image == clean).all()]
    assert same == [] and len(found) == 2 * len(names)
    # The square, by other means: the upper left corner, and that of every tile.
    square = create_applicator("patch", patch_size=4)(clean / 255, create_trigger("square", size=2))
    assert (found["square", "patch"] == (square * 255).round()).all()
    assert (found["square", "image"] == clean).all(1).sum() >= 32 * 32 - 16


def test_a_picture_is_enlarged_without_smoothing(hooks) -> None:
    with Image.open(BytesIO(hooks.png(hooks.clean_image()))) as image:
        pixels = np.asarray(image)
    assert (pixels[::4, ::4] == hooks.clean_image()[0].permute(1, 2, 0).numpy()).all()
    assert (pixels[3::4, 3::4] == pixels[::4, ::4]).all()


def test_the_table_of_suites_counts_the_committed_runs_and_links_to_reports(hooks) -> None:
    rows = hooks.suites().splitlines()[2:]
    folders = hooks.results_folders()
    assert len(rows) == len(folders) >= 15
    for row, folder in zip(rows, folders, strict=True):
        manifest = json.loads((folder / "suite.json").read_text())
        _, report, scale, runs, _ = (text.strip() for text in row.split("|"))
        assert (scale, int(runs)) == (manifest["scale"] or "–", manifest["finished"])
        assert f"made/reports/{hooks.label(folder)}/index.html" in report


def test_links_of_pages_lead_to_what_is_made(hooks, monkeypatch) -> None:
    monkeypatch.setattr(hooks, "draw_report", lambda document: type("Report", (), {"page": "<p>"}))
    made = dict(hooks.made_files())
    text = hooks.on_page_markdown(
        "a <!-- made: suites --> ![b](../../benchmarks/results/report/carriers.png)"
    )
    assert text.startswith("a | results |") and text.endswith("![b](made/results/report/carriers.png)")
    assert (
        made["results/report/carriers.png"] == (ROOT / "benchmarks/results/report/carriers.png").read_bytes()
    )
    assert {f"reports/{hooks.label(folder)}/index.html" for folder in hooks.results_folders()} <= made.keys()
    # A page in a folder, and tables, which are in the report of their suite.
    link = "[c](../../../benchmarks/results/removal/medium/table.md) [d](../../../benchmarks/first_gate.py)"
    assert hooks.on_page_markdown(link) == (
        "[c](../made/reports/removal-medium/index.html) [d](../made/first_gate.py)"
    )
    assert made["first_gate.py"] == (ROOT / "benchmarks" / "first_gate.py").read_bytes()
    records = "results/badpatches-table1/small/records.jsonl"
    assert (
        made["reports/badpatches-table1-small/records.jsonl"] == (ROOT / "benchmarks" / records).read_bytes()
    )


@pytest.mark.slow
def test_the_claims_of_the_site_are_those_of_the_repository(hooks) -> None:
    repository = (ROOT / "benchmarks" / "claims.md").read_text(encoding="utf-8")
    rows = [line for line in repository.splitlines() if line.startswith("| ") and "](" not in line]
    assert len(rows) >= 20 and set(rows) <= set(hooks.claims().splitlines())


@pytest.mark.slow
def test_the_committed_analysis_is_still_drawn(hooks) -> None:
    report = hooks.draw_report(hooks.load_document(hooks.RESULTS / "report" / "analysis.json"))
    assert "This model is backdoored." in report.page and "moe/2" in report.page
