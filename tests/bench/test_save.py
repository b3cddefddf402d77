"""Results folders: complete, the same bytes twice, and never over what they are not."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from fake_runs import fill, finished, part_suite, write

from backdoorbench_moe.bench import save
from backdoorbench_moe.bench.pages.page import page
from backdoorbench_moe.bench.save import redraw_results, save_results
from backdoorbench_moe.bench.tables.results import ResultSet, read_known
from backdoorbench_moe.bench.tables.tidy import environments, tidy_csv
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records.locking import hold_place

PLOT = "plots/asr-over-the-poisoning-rate"
FILES = {"suite.json", "records.jsonl", "tidy.csv", "table.csv", "table.md", "table.tex", "environment.json"}
FILES |= {"index.html", f"{PLOT}.svg", f"{PLOT}.png"}


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    fill(part_suite(), output)
    return output


@pytest.fixture
def results(runs) -> ResultSet:
    return ResultSet.from_runs(part_suite(), runs)


@pytest.mark.slow
def test_the_same_records_make_the_same_bytes_also_from_the_folder_itself(results, tmp_path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    save_results(results, first)
    save_results(results, second)
    before = contents(first)
    assert before.keys() == FILES
    assert contents(second) == before
    save_results(ResultSet.from_folder(part_suite(), first), third)
    assert contents(third) == before


@pytest.mark.slow
def test_a_newer_drawing_takes_the_place_of_the_older(results, runs, tmp_path) -> None:
    folder = tmp_path / "r"
    save_results(results, folder)
    more = tmp_path / "more"
    fill(part_suite(), more)
    last = part_suite().cells[-1]
    write(more, finished(last.spec))
    (folder / "plots" / "old-title.svg").write_text("an old plot")
    newer = ResultSet.from_runs(part_suite(), more)
    save_results(newer, folder)
    assert contents(folder).keys() == FILES
    assert json.loads((folder / "suite.json").read_text())["finished"] == 14 + 2 + 1
    # And never the other way round: the older lack a run.
    with pytest.raises(
        RecordError, match=rf"holds 1 finished runs that are not among these.*{last.spec.digest}"
    ):
        save_results(results, folder)


def test_another_version_is_refused_with_both_named_and_nothing_written(results, tmp_path) -> None:
    save_results(results, tmp_path / "r")
    before = contents(tmp_path / "r")
    newer = replace(results, suite=part_suite(version=4))
    message = "is of version 3 of suite part, which is now at version 4"
    with pytest.raises(RecordError, match=message):
        save_results(newer, tmp_path / "r")
    assert contents(tmp_path / "r") == before
    with pytest.raises(RecordError, match=message):
        ResultSet.from_folder(newer.suite, tmp_path / "r")


def test_a_folder_is_saved_by_one_process_at_a_time_and_has_no_lock_file(runs, tmp_path, monkeypatch) -> None:
    """Each opening of a folder has a lock of its own, in one process and in two."""
    started, check = threading.Event(), save._check
    monkeypatch.setattr(save, "_check", lambda *given: (started.set(), check(*given)))
    folder, suite = tmp_path / "suite" / "small", part_suite(plots=[])
    results = ResultSet.from_runs(suite, runs)
    with ThreadPoolExecutor(1) as other:
        folder.parent.mkdir()
        with hold_place(folder):
            saving = other.submit(save_results, results, folder)
            assert not started.wait(0.3) and not folder.exists()
        saving.result()
    assert started.is_set() and [path.name for path in folder.parent.iterdir()] == ["small"]
    assert contents(folder).keys() == {name for name in FILES if not name.startswith("plots/")}


def test_a_folder_that_is_being_saved_is_not_redrawn(runs, tmp_path, monkeypatch) -> None:
    started, read = threading.Event(), save.read_lines
    folder, suite = tmp_path / "suite" / "small", part_suite(plots=[])
    save_results(ResultSet.from_runs(suite, runs), folder)
    monkeypatch.setattr(save, "read_lines", lambda *given: (started.set(), read(*given))[1])
    with ThreadPoolExecutor(1) as other:
        with hold_place(folder):
            drawing = other.submit(redraw_results, suite, folder)
            assert not started.wait(0.3)
        drawing.result()
    assert started.is_set()


def test_the_first_folder_of_a_suite_is_held_as_well(runs, tmp_path, monkeypatch) -> None:
    """Whoever saves it next finds the folder above it, which was not there before."""
    tried, folder = [], tmp_path / "suite" / "small"

    def check(*_: object) -> None:
        descriptor = os.open(folder.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        tried.append(folder)

    monkeypatch.setattr(save, "_check", check)
    save_results(ResultSet.from_runs(part_suite(plots=[]), runs), folder)
    assert tried == [folder]
    with pytest.raises(RecordError, match=r"results folder .*suite.json/a/b: Not a directory"):
        save_results(ResultSet.from_runs(part_suite(plots=[]), runs), folder / "suite.json" / "a" / "b")


@pytest.mark.slow
def test_other_suites_and_other_folders_are_refused(results, tmp_path) -> None:
    save_results(results, tmp_path / "r")
    with pytest.raises(RecordError, match="expected suite 'other', found 'part'"):
        save_results(replace(results, suite=part_suite("other")), tmp_path / "r")
    changed = part_suite(base={"recipe": "paper", "dataset": "cifar10", "train": {"epochs": 3}})
    with pytest.raises(RecordError, match="changed without a new version"):
        save_results(replace(results, suite=changed), tmp_path / "r")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(RecordError, match=r"mine: expected a suite\.json in it, found none"):
        save_results(results, mine)
    with pytest.raises(RecordError, match=r"thesis\.txt: expected a folder, found a file"):
        save_results(results, mine / "thesis.txt")
    assert contents(mine) == {"thesis.txt": b"mine"}


@pytest.mark.slow
def test_a_folder_without_or_with_damaged_records(results, tmp_path) -> None:
    save_results(results, tmp_path / "r")
    file = tmp_path / "r" / "records.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    for call in (
        lambda: ResultSet.from_folder(part_suite(), tmp_path / "r"),
        lambda: save_results(results, tmp_path / "r"),
    ):
        with pytest.raises(RecordError, match=r"records\.jsonl is missing or damaged"):
            call()
    file.unlink()
    save_results(results, tmp_path / "r")
    assert file.read_bytes() == whole


def test_tidy_csv_is_the_records(results) -> None:
    rows = list(csv.DictReader(io.StringIO(tidy_csv(results))))
    assert len(rows) == 16
    for row in rows:
        record = results.records[row["digest"]]
        for metric, found in record.metrics.items():
            assert [float(row[f"{metric}{end}"]) for end in ("", "_low", "_high", "_n")] == [
                found[key] for key in ("value", "low", "high", "n")
            ]
    first, twin = rows[0], rows[-1]
    assert (first["trigger"], first["applicator"], first["poison_rate_percent"]) == ("square", "image", "0.5")
    assert (first["train_seconds"], first["threads"], first["torch"]) == ("60.5", "2", "2.15.0")
    assert float(first["cad"]) == pytest.approx(2.0)
    assert (twin["trigger"], twin["asr"], twin["poison_rate_percent"]) == ("none", "", "0.0")


def test_stages_of_a_defense_have_columns_and_places(tmp_path) -> None:
    table = {"title": "t", "rows": ["applicator.name", "poison.rate"], "columns": "trigger.name"}
    suite = part_suite(tables=[{**table, "metrics": ["pruned.asr"]}])
    record = finished(suite.cells[0].spec)
    stage = {"value": 12.5, "n": 9000, "low": 12.0, "high": 13.0}
    record.stages = [{"name": "pruned", "metrics": {"ba": stage, "asr": stage}, "seconds": 1.0}]
    write(tmp_path, record)
    results = ResultSet.from_runs(suite, tmp_path)
    [row] = csv.DictReader(io.StringIO(tidy_csv(results)))
    assert (row["pruned_asr"], row["pruned_asr_high"], row["pruned_cad"]) == ("12.5", "13.0", "")
    statistic = results.statistic(suite.cells[0], "pruned.asr")
    assert statistic is not None
    assert statistic.mean == 12.5
    assert "attack success rate (ASR) after pruned, %" in page(results)


def test_environments_are_counted(tmp_path) -> None:
    suite = part_suite()
    for number, cell in enumerate(suite.cells[:3]):
        write(tmp_path, finished(cell.spec, threads=1 if number == 0 else 2))
    found = environments(ResultSet.from_runs(suite, tmp_path))
    assert [(row["runs"], row["threads"]) for row in found] == [(2, 2), (1, 1)]


def test_days_do_not_tell_environments_apart(tmp_path) -> None:
    suite = part_suite()
    days = ("2026-11-26", None, "2026-11-24", "2026-11-25")
    for cell, day in zip(suite.cells, days, strict=False):
        write(tmp_path, finished(cell.spec, **({"date": day} if day else {})))
    [row] = environments(ResultSet.from_runs(suite, tmp_path))
    assert (row["runs"], row["dates"]) == (4, ["2026-11-24", "2026-11-26"])


def test_where_data_lay_is_in_no_file(tmp_path) -> None:
    base = {"recipe": "paper", "dataset": {"name": "cifar10", "root": "/somewhere/of/mine", "download": True}}
    suite = part_suite(base=base, tables=[{"title": "t", "rows": ["dataset"], "columns": "trigger.name"}],
                       grid={"applicator": "image", "trigger": ["square", "warp"]}, plots=[])  # fmt: skip
    write(tmp_path / "runs", finished(suite.cells[0].spec))
    save_results(ResultSet.from_runs(suite, tmp_path / "runs"), tmp_path / "r")
    for name, content in contents(tmp_path / "r").items():
        assert b"somewhere" not in content, name
    # The records are whole without it.
    assert len(ResultSet.from_folder(suite, tmp_path / "r").finished()) == 1


class Page(HTMLParser):
    """What a page asks for, and its tags that stand open."""

    VOID = ("meta", "br", "hr", "img", "link", "use", "path")

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action") and v]
        self.references += [u for k, v in attrs if k == "style" and v for u in re.findall(r"url\((.*?)\)", v)]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_is_well_formed(results) -> None:
    text = page(results)
    seen = Page()
    seen.feed(text)
    assert seen.open == []
    assert seen.references
    assert all(reference.startswith("#") for reference in seen.references)
    assert {reference[1:] for reference in seen.references} <= set(seen.ids)
    assert len(seen.ids) == len(set(seen.ids))
    assert not {"script", "link", "img", "iframe"} & set(seen.tags)
    assert "@import" not in text
    assert seen.tags.count("figure") == 1
    assert "bbmoe bench run part --repeats 2" in text
    assert "12.8 (n" not in text
    assert "12.8 ± 2.4 (n 2)" in text


def test_texts_of_a_suite_are_text_on_the_page(tmp_path) -> None:
    evil = "<script>alert(1)</script>"
    suite = part_suite(
        title=evil,
        grid={"applicator": "image", "trigger": {"name": "square", "size": 4}},
        tables=[{"title": evil, "rows": ["trigger"], "columns": "applicator"}],
        plots=[{"title": evil}],
    )
    text = page(ResultSet.from_runs(suite, tmp_path))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4


@pytest.mark.slow
def test_results_folders_count_beside_run_folders(results, tmp_path) -> None:
    """A results folder and the rest of the runs make what all the runs make; the runs' own come first."""
    save_results(results, tmp_path / "all")
    suite = part_suite()
    half = [record for record in results.finished() if record.run_spec.seed == 0]
    for record in half:
        write(tmp_path / "half", record)
    with pytest.raises(RecordError, match="expected a folder of run folders"):
        ResultSet.from_runs(suite, tmp_path / "none")
    known = read_known([tmp_path / "all"])
    assert len(known) == len(results.finished())
    for place in ("half", "none"):
        both = ResultSet.from_runs(suite, tmp_path / place, known)
        save_results(both, tmp_path / f"with-{place}")
        assert contents(tmp_path / f"with-{place}") == contents(tmp_path / "all")
    better = replace(half[-1], metrics={**half[-1].metrics, "ba": {"value": 1.0, "n": 100}})
    write(tmp_path / "half", better)
    assert ResultSet.from_runs(suite, tmp_path / "half", known).record(better.run_spec) == better


def test_only_finished_runs_of_a_results_folder_are_known(results, tmp_path) -> None:
    save_results(results, tmp_path / "r")
    lines = (tmp_path / "r" / "records.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    changed = json.dumps({**first, "status": "failed"})
    (tmp_path / "r" / "records.jsonl").write_text("\n".join([changed, *lines[1:]]))
    assert set(read_known([tmp_path / "r"])) == {json.loads(line)["digest"] for line in lines[1:]}
    with pytest.raises(RecordError, match=r"expected a suite.json in it, found none"):
        read_known([tmp_path])
