"""`bbmoe report`: what its page holds, that the command on it gives it again, and what is refused."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from fake_runs import PART, fill, finished, part_suite, write

from backdoorbench_moe.bench.save import save_results
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.records import Record

DESCRIPTION = "Whether `warp` & <square> differ."


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a suite file, some of its runs, one that failed, and one of another day."""
    suite = {key: value for key, value in PART.items() if key != "plots"}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({**suite, "description": DESCRIPTION}))
    fill(part_suite(), tmp_path / "runs")
    first, last = part_suite().cells[0], part_suite().cells[-1]
    write(tmp_path / "runs", finished(first.spec, date="2026-11-24"))
    failed = Record.for_spec(last.runs(2)[1])
    failed.status, failed.error = "failed", "no <space> left"
    write(tmp_path / "runs", failed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(page: str) -> str:
    """The text of a page, without tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.partition("</style>")[2])).split())


def test_the_page_says_what_was_measured_what_is_missing_where_and_how(bbmoe, place) -> None:
    code, out, err = bbmoe("report", "part.yaml", "--save", "docs/page.html")
    assert (code, out) == (0, "") and "report: docs/page.html" in err
    assert "runs are finished; to run the others: bbmoe bench run part.yaml" in err
    page = (place / "docs" / "page.html").read_text(encoding="utf-8")
    text = text_of(page)
    assert "Whether warp & <square> differ." in text and "<code>warp</code>" in page
    results = ResultSet.from_runs(part_suite(), place / "runs")
    statistic = results.statistic(part_suite().cells[0], "asr")
    assert statistic is not None and statistic.n == 2
    ends = [results.metric(spec, "asr") for spec in part_suite().cells[0].runs(2)]
    low, high = (f(row[key] for row in ends if row) for f, key in ((min, "low"), (max, "high")))
    assert f"95%: {low:.1f}–{high:.1f}" in text
    assert "Of 8 cells: no run of 1 cell is finished." in text
    assert "1 failed" in text and f"{part_suite().cells[-1].runs(2)[1].name}: no <space> left" in text
    assert "2026-11-24" in text


def test_every_measured_seed_links_to_its_record(bbmoe, place) -> None:
    bbmoe("report", "part.yaml", "--save", "docs/page.html")
    page = (place / "docs" / "page.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^#"][^"]*)"', page)
    records = [json.loads((place / "docs" / link).read_text(encoding="utf-8")) for link in links]
    attacked = [record for record in records if record["spec"].get("trigger")]
    assert len(attacked) == len(records) == 14
    assert all(record["status"] == "finished" for record in records)


def test_a_results_folder_gives_lines_of_its_records_and_published_addresses(bbmoe, place) -> None:
    results = ResultSet.from_runs(part_suite(), place / "runs")
    save_results(results, place / "r")
    lines = (place / "r" / "records.jsonl").read_text().splitlines()
    bbmoe("report", "part.yaml", "--from", "r", "--published", "https://host/r")
    page = (place / "part.html").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r'href="https://host/r/records\.jsonl#L(\d+)"', page)]
    assert len(numbers) == len(set(numbers)) == 14
    assert all(json.loads(lines[number - 1])["spec"].get("trigger") for number in numbers)
    # The page inside the folder has the same links, to the file beside it.
    inside = (place / "r" / "index.html").read_text(encoding="utf-8")
    assert {int(n) for n in re.findall(r'href="records\.jsonl#L(\d+)"', inside)} == {*numbers}


@pytest.mark.parametrize("words", [[], ["--save", "a b.html", "--repeats", "1"], ["--output", "./runs"]])
def test_the_last_command_on_the_page_gives_the_page(bbmoe, place, words) -> None:
    bbmoe("report", "part.yaml", *words)
    file = place / ("a b.html" if "--save" in words else "part.html")
    page = file.read_text(encoding="utf-8")
    [command] = [line for line in html.unescape(page).splitlines() if line.startswith("bbmoe report")]
    file.unlink()
    assert bbmoe(*shlex.split(command)[1:])[0] == 0
    assert file.read_text(encoding="utf-8") == page


def test_a_suite_of_mixtures_of_which_nothing_was_run(bbmoe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    code, _, err = bbmoe("report", "moevil-layers", "--scale", "signs", width=200)
    assert code == 0 and "moevil-layers-signs: none of " in err
    assert "to run them: bbmoe bench run moevil-layers --scale signs" in err
    text = text_of((tmp_path / "moevil-layers-signs.html").read_text(encoding="utf-8"))
    assert "Of 5 cells: no run of 5 cells is finished." in text and "0, 1, 2, 3, 4 missing" in text


BAD = {
    "no suite": (["nothing"], "suite: unknown 'nothing'"),
    "no scale": (["false-alarms", "--scale", "tiny"], "scale: unknown 'tiny'"),
    "no folder": (["false-alarms", "--from", "nowhere"], "expected a suite.json in it, found none"),
    "address": (["false-alarms", "--published", "https://host"], "--published: can only be used with --from"),
    "no runs": (
        ["false-alarms", "--output", "nowhere"],
        "--output nowhere: expected a folder of run folders",
    ),
    "a file of runs": (["false-alarms", "--output", "file"], "expected a folder of run folders, got a file"),
    "a file of results": (
        ["false-alarms", "--from", "file"],
        "--from: results folder file: expected a suite.json",
    ),
    "no path": (["none.yaml"], "suite: 'none.yaml' not found"),
    "a path of a folder": (["./"], "suite: expected a file, got the folder './'"),
    "two sources": (["false-alarms", "--from", ".", "--output", "x"], "--output: cannot be used with --from"),
    "in a file": (["false-alarms", "--output", ".", "--save", "file/a.html"], "file is a file"),
    "a folder": (["false-alarms", "--output", ".", "--save", "."], "found a folder"),
}


@pytest.mark.parametrize(("words", "says"), BAD.values(), ids=BAD)
def test_mistakes_are_one_line(bbmoe, tmp_path, monkeypatch, words, says) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, err = bbmoe("report", *words, width=200)
    assert (code, out) == (2, "") and says in err and "Traceback" not in err
