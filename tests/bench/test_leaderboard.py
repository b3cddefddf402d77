"""The leaderboard: every cell has a row, what stands in it, where its records are, and that the page loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_runs import finished, write
from suites import tiny_suite

from backdoorbench_moe.bench.pages.false_alarms import false_alarms
from backdoorbench_moe.bench.pages.found import relative_link
from backdoorbench_moe.bench.pages.leaderboard import Board, open_board, rows
from backdoorbench_moe.bench.pages.leaderboard_page import leaderboard_page
from backdoorbench_moe.bench.save import save_results
from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.statistic import interval_of
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.ops.intervals import seeds_interval
from backdoorbench_moe.ops.metrics import proportion
from backdoorbench_moe.records import Record

TUNED, FILTERED, MISSING = ["fine-tuning"], ["strip"], [{"name": "fine-pruning", "ratio": 0.2}]
GRID = {
    "trigger": {"name": "square", "size": 4},
    "applicator": ["image", "patch"],
    "defenses": [[], TUNED, FILTERED, MISSING],
}
CLEAN = {"attack": None, "defenses": [FILTERED, ["reroute"], MISSING]}


def suite(name: str = "attacks", repeats: int = 2, **changes) -> Suite:
    return replace(tiny_suite(grid=changes.pop("grid", GRID), repeats=repeats, **changes), name=name)


def clean_suite() -> Suite:
    return suite("clean", grid=CLEAN)


def fill_attacks(output: Path, **changes) -> None:
    """Write the runs of all cells but those of pruning; those of the patches are of seed 0 only."""
    for cell in suite().cells:
        names = [part.name for part in cell.spec.defenses]
        if "fine-pruning" in names:
            continue
        for spec in cell.runs(1 if cell.values["applicator"] == "patch" else 2):
            record = finished(spec, ba=8000 - 100 * spec.seed, asr=9000 if not names else 1800, **changes)
            if names:
                record.stages = [
                    {"name": "before", "metrics": {"ra": asdict(proportion(90, 9000))}, "seconds": 0.0},
                    {"name": "after", "metrics": record.metrics, "seconds": 1.0},
                ]
            if names == ["strip"]:
                record.metrics |= {
                    "fpr": asdict(proportion(100, 2000)),
                    "auroc": {"value": 90.0, "n": 2000, "low": 89.0, "high": 91.0},
                }
            write(output, record)


def judged(about: str, suspicious: object, scores: object = None) -> dict[str, object]:
    return {
        "about": about,
        "scores": scores,
        "threshold": 1.0,
        "suspicious": suspicious,
        "reason": "r",
        "details": {},
    }


def fill_clean(output: Path) -> None:
    """Two seeds of a filter; one seed of a detector of classes, samples and experts, which also chooses an expert."""
    strip, reroute, _ = clean_suite().cells
    for seed, spec in enumerate(strip.runs(2)):
        record = finished(spec)
        record.metrics["fpr"] = asdict(proportion((100, 140)[seed], 2000))
        record.judgements = [judged("input", [])]
        write(output, record)
    record = finished(reroute.runs(1)[0])
    record.data["train_images"] = 96
    record.judgements = [
        judged("class", ["1"], {"0": 0.5, "1": 2.5, "2": 0.1}),
        judged("sample", 12),
        judged("model", ["model"]),
        {**judged("expert", ["moe/0"], {"moe/0": 90.0, "moe/1": 80.0}), "threshold": None},
        judged("expert", ["moe/1"], {"moe/0": 0.5, "moe/1": 2.5, "moe/2": 0.1, "moe/3": 0.2}),
    ]
    write(output, record)


@pytest.fixture
def board(tmp_path) -> Board:
    fill_attacks(tmp_path)
    fill_clean(tmp_path)
    return open_board([suite(), clean_suite()], runs=tmp_path)


def by_name(board: Board) -> dict[tuple[str, str], object]:
    return {(row.setting.applicator, row.setting.defense): row for row in rows(board)}


def test_every_cell_has_a_row_and_what_was_not_run_is_missing(board) -> None:
    found = by_name(board)
    assert set(found) == {
        (a, d) for a in ("image", "patch") for d in ("none", "fine-tuning", "strip", "fine-pruning")
    }
    missing = found["image", "fine-pruning"]
    assert (missing.state, missing.seeds, missing.wanted, dict(missing.values)) == ("missing", 0, 2, {})
    assert missing.setting.defense_options == "ratio=0.2" and missing.setting.attack_options == "size=4"
    assert missing.setting.attack == "square by image, 10%"
    assert (found["patch", "none"].seeds, found["image", "none"].seeds) == (1, 2)


def test_values_are_means_and_what_cannot_be_measured_is_told_from_what_was_not(board) -> None:
    found = by_name(board)
    tuned, filtered, none = (found["image", name] for name in ("fine-tuning", "strip", "none"))
    assert tuned.values["ba"].mean == pytest.approx(79.5) and tuned.values["asr"].mean == pytest.approx(20.0)
    assert none.values["ra"].mean == pytest.approx(1.0), "of the stage before its defenses"
    assert filtered.values["auroc"].mean == 90.0 and none.states["auroc"] == "–"
    assert none.states["target_rate"] == "not measured" and filtered.states["target_rate"] == "–"
    assert tuned.states["asr_over_tuning"] == filtered.states["asr_over_tuning"] == "–"


def test_with_two_seeds_the_interval_spans_those_of_the_seeds(board) -> None:
    low, high = by_name(board)["image", "none"].values["ba"].interval
    ends = [proportion(8000, 10000), proportion(7900, 10000)]
    assert (low, high) == (ends[1].low, ends[0].high)
    assert interval_of([], None) is None and interval_of([{"value": 1.0}], None) is None
    assert interval_of([{"value": 1.0, "low": 0.0, "high": 2.0}], (0.5, 1.5)) == (0.5, 1.5)


def test_a_model_that_predicts_one_class_is_marked(tmp_path) -> None:
    fill_attacks(tmp_path)
    cell = suite().cells[0]
    write(tmp_path, finished(cell.spec, ba=5000, asr=9000))
    board = open_board([suite()], runs=tmp_path)
    assert by_name(board)["image", "none"].near_chance == 1
    page = leaderboard_page(board, ["attacks"], relative_link(tmp_path))
    assert "1 of 2 seeds near chance" in page and "says nothing about the attack" in page


def test_suites_share_records_and_a_cell_stands_once(tmp_path) -> None:
    fill_attacks(tmp_path)
    only = {**GRID, "defenses": [[]]}
    found = open_board([suite("few", 1, grid=only), suite()], runs=tmp_path)
    none = [row for row in rows(found) if row.setting.defense == "none" and row.setting.applicator == "image"]
    assert [(row.suite, row.seeds) for row in none] == [("attacks", 2)]


def test_false_alarms_by_hand(board) -> None:
    found = {(row.setting.defense, row.about): row for row in false_alarms(board)}
    assert set(found) == {
        ("strip", "input"),
        ("reroute", "class"),
        ("reroute", "sample"),
        ("reroute", "expert"),
        ("reroute", "model"),
        ("fine-pruning", ""),
    }
    strip = found["strip", "input"]
    assert strip.rate.mean == pytest.approx(6.0) and strip.judged == 2000 and strip.alarmed is None
    assert strip.rate.interval == (proportion(100, 2000).low, proportion(140, 2000).high)
    # The data of these records has two classes.
    classes, samples, model = (found["reroute", about] for about in ("class", "sample", "model"))
    # Without a threshold, moe/0 was chosen and is no alarm.
    experts = found["reroute", "expert"]
    assert (experts.rate.mean, experts.judged, experts.alarmed) == (25.0, 4, 1)
    assert classes.rate.mean == 50.0 and (classes.judged, classes.alarmed) == (2, 1)
    assert samples.rate.mean == 12.5 and (samples.judged, samples.alarmed) == (96, None)
    assert (model.rate.mean, model.judged, model.alarmed, model.seeds, model.wanted) == (100.0, 1, 1, 1, 2)
    assert found["fine-pruning", ""].state == "missing" and found["fine-pruning", ""].rate is None


def test_rejected_inputs_are_counted_exactly_and_the_smallest_test_set_limits_the_interval(tmp_path) -> None:
    """In floating point, 9,000 times 13 / 9,000 in percent is a little less than 13."""
    clean, counts = suite("clean", 3, grid=CLEAN), ((13, 9000), (26, 9000), (40, 8000))
    for spec, (hits, of) in zip(clean.cells[0].runs(3), counts, strict=True):
        record = finished(spec)
        record.metrics["fpr"] = asdict(proportion(hits, of))
        record.judgements = [judged("input", [])]
        write(tmp_path, record)
    [found] = [row for row in false_alarms(open_board([clean], runs=tmp_path)) if row.about == "input"]
    shares = [100 * hits / of for hits, of in counts]
    assert found.judged == 8000 and found.rate is not None
    assert found.rate.mean == pytest.approx(sum(shares) / 3, rel=1e-9)
    assert found.rate.interval == seeds_interval(shares, 8000)


class Outline(HTMLParser):
    """The rows of the tables, the links and whatever is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.loaded: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        self.loaded += [(tag, given[key]) for key in ("src", "srcset", "data", "poster") if given.get(key)]
        if tag == "link":
            self.loaded.append((tag, given["href"]))
        if tag == "a":
            self.links.append(given["href"])
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data) -> None:
        if self.rows and data.strip():
            self.rows[-1].append(data.strip())


def test_the_page_loads_nothing_and_admits_its_own_script_only(board, tmp_path) -> None:
    text = leaderboard_page(board, ["attacks", "my dir/clean.yaml"], relative_link(tmp_path))
    found = Outline(text)
    assert not found.loaded and not re.search(r"url\(|@import|https?://", text)
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "bbmoe bench page attacks 'my dir/clean.yaml'\n" in text.replace("&#39;", "'")
    [pruned, _] = [row for row in found.rows if "fine-pruning" in row and "square by image, 10%" in row] * 2
    assert pruned[-2:] == ["missing", "0 of 2"]
    assert leaderboard_page(board, ["attacks", "my dir/clean.yaml"], relative_link(tmp_path)) == text


def test_every_record_is_linked_at_its_line(tmp_path) -> None:
    runs, folders, page = tmp_path / "runs", tmp_path / "results", tmp_path / "docs" / "a b"
    fill_attacks(runs)
    results = ResultSet.from_runs(suite(), runs)
    save_results(results, folders / "attacks")
    board = open_board([suite(), clean_suite()], runs=tmp_path, folders=folders)
    links = Outline(leaderboard_page(board, ["attacks", "clean"], relative_link(page))).links
    links = [link for link in links if ".jsonl" in link]
    assert len(links) == len(results.finished())
    digests = set()
    for link in links:
        file, line = link.split("#L")
        text = (page / file).resolve().read_text(encoding="utf-8").splitlines()[int(line) - 1]
        digests.add(json.loads(text)["digest"])
    assert digests == {record.digest for record in results.finished()}
    published = relative_link(page, "https://host/results/", folders)
    assert published(next(iter(board.found.values()))) == "https://host/results/attacks/records.jsonl#L1"


def test_mixtures_and_other_versions_are_refused(tmp_path) -> None:
    mixture = {"attack": "moevil", "gate": ["top-k"]}
    base = {"recipe": "quick", "dataset": "tiny"}
    with pytest.raises(ConfigError, match="contains mixtures of merged experts"):
        open_board([suite("mixed", grid=mixture, base=base)], runs=tmp_path)
    fill_attacks(tmp_path / "runs")
    save_results(ResultSet.from_runs(suite(), tmp_path / "runs"), tmp_path / "results" / "attacks")
    with pytest.raises(RecordError, match="is of version 1 of suite attacks, which is now at version 2"):
        open_board([suite(version=2)], runs=tmp_path, folders=tmp_path / "results")


def test_an_unfinished_run_says_so(tmp_path) -> None:
    fill_attacks(tmp_path)
    record: Record = finished(suite().cells[3].spec)
    record.status, record.error = "failed", "out of memory"
    write(tmp_path, record)
    assert by_name(open_board([suite()], runs=tmp_path))["image", "fine-pruning"].state == "failed"
