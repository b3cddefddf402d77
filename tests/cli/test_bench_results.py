"""`bbmoe bench table`, `compare` and `export`: thin, and one line for what is wrong."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import yaml
from click.testing import CliRunner
from fake_runs import PART, fill, finished, part_suite, write

from backdoorbench_moe.bench.running.worker import Outcome
from backdoorbench_moe.bench.suites.suite import order
from backdoorbench_moe.cli.app import bbmoe
from backdoorbench_moe.cli.bench.display import make_display
from backdoorbench_moe.errors import BbmoeError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A suite file and its runs."""
    folder = tmp_path_factory.mktemp("bench")
    suite = {key: value for key, value in PART.items() if key != "plots"}
    (folder / "part.yaml").write_text(yaml.safe_dump(suite))
    fill(part_suite(), folder / "runs")
    return folder


def run(place, command: str, *args: str):
    line = ["bench", command, str(place / "part.yaml"), *args, "--output", str(place / "runs")]
    return CliRunner().invoke(bbmoe, line, catch_exceptions=False)


@pytest.mark.parametrize(
    ("form", "begins", "holds"),
    [
        ("rich", "Part of Table 1\n", "90.7 −89.0"),
        ("markdown", "# Part of Table 1\n", "1.7 ± 2.4 (n 2)<br>paper 90.7, −89.0 |"),
        ("csv", "suite,version,scale,dataset", "part,3,,cifar10,pmoe,square,image"),
        ("latex", "% \\usepackage{booktabs}", "1.7 $\\pm$ 2.4 (n 2)"),
        ("html", "<!doctype html>\n", "1.7 ± 2.4 (n 2)"),
    ],
)
def test_formats(place, form, begins, holds) -> None:
    result = run(place, "table", "--format", form)
    assert result.exit_code == 0
    assert result.stdout.startswith(begins)
    assert holds in result.stdout


def test_intervals_are_shown_instead_of_deviations(place) -> None:
    text = run(place, "table", "--intervals", "--format", "markdown").stdout
    # CAD has no interval with two seeds, and keeps its deviation.
    assert "1.7 [0.0–" in text and "1.7 ± " not in text and "2.0 ± 0.0 (n 2)" in text
    with pytest.raises(
        BbmoeError, match="--intervals: cannot be used with --format csv, which always has them"
    ):
        run(place, "table", "--intervals", "--format", "csv")


def test_only_and_repeats(place) -> None:
    text = run(place, "table", "--only", "trigger=warp", "--repeats", "1", "--format", "markdown").stdout
    assert "| applicator | rate | warp |" in text
    assert "square" not in text
    assert "(n 2)" not in text
    assert "3 of 4 runs finished" in text


@pytest.mark.slow
def test_save_then_draw_from_what_was_saved(place, tmp_path) -> None:
    saved = tmp_path / "r"
    first = run(place, "table", "--format", "markdown", "--save", str(saved))
    assert str(saved) in first.stderr
    assert (saved / "table.md").read_text() + "\n" == first.stdout
    again = run(place, "table", "--format", "markdown", "--from", str(saved))
    assert again.stdout == first.stdout
    some = run(place, "table", "--format", "markdown", "--from", str(saved), "--only", "trigger=warp")
    assert "square" not in some.stdout


def test_a_results_folder_is_drawn_with_all_of_its_seeds(tmp_path) -> None:
    """The suite has two seeds per cell, the folder has three."""
    place = tmp_path
    suite = {key: value for key, value in PART.items() if key != "plots"}
    (place / "part.yaml").write_text(yaml.safe_dump(suite))
    fill(part_suite(), place / "runs", repeats=3)
    saved = tmp_path / "results" / "part"
    run(place, "table", "--repeats", "3", "--save", str(saved))
    drawn = run(place, "table", "--from", str(saved), "--format", "markdown").stdout
    assert drawn == (saved / "table.md").read_text() + "\n" and "(n 3)" in drawn
    assert (
        "(n 2)" in run(place, "table", "--from", str(saved), "--repeats", "2", "--format", "markdown").stdout
    )
    page = run(place, "page", "--from", str(tmp_path / "results")).stdout
    assert "3 of 3" in page and "--repeats 3" in page
    file = tmp_path / "report.html"
    line = ["report", str(place / "part.yaml"), "--from", str(saved), "--save", str(file)]
    assert CliRunner().invoke(bbmoe, line, catch_exceptions=False).exit_code == 0
    assert "(n 3)" in file.read_text()
    manifest = json.loads((saved / "suite.json").read_text())
    for wrong in ("3", True, 0):
        (saved / "suite.json").write_text(json.dumps({**manifest, "repeats": wrong}))
        with pytest.raises(BbmoeError, match=r"suite\.json is damaged: repeats: expected an integer"):
            run(place, "table", "--from", str(saved))


@pytest.mark.slow
def test_results_folders_beside_run_folders(place, tmp_path) -> None:
    saved, none = tmp_path / "r", ("--output", str(tmp_path / "none"))
    all_of_it = run(place, "table", "--format", "markdown", "--save", str(saved)).stdout
    line = ["bench", "table", str(place / "part.yaml"), "--format", "markdown", "--with", str(saved), *none]
    assert CliRunner().invoke(bbmoe, line, catch_exceptions=False).stdout == all_of_it
    with pytest.raises(BbmoeError, match="--with: cannot be used with --from"):
        run(place, "table", "--with", str(saved), "--from", str(saved))
    with pytest.raises(BbmoeError, match=r"suite.json in it, found none"):
        run(place, "run", "--with", str(tmp_path), "--dry-run")


def test_a_part_of_a_suite_is_not_saved(place, tmp_path) -> None:
    with pytest.raises(BbmoeError, match="--save: cannot be used with --only"):
        run(place, "table", "--only", "trigger=warp", "--save", str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_export(place, tmp_path) -> None:
    with pytest.raises(BbmoeError, match="expected --csv or --jsonl"):
        run(place, "export")
    with pytest.raises(BbmoeError, match="only one of"):
        run(place, "export", "--csv", "-", "--jsonl", "-")
    result = run(place, "export", "--csv", "-", "--jsonl", str(tmp_path / "all.jsonl"))
    assert len(list(csv.DictReader(io.StringIO(result.stdout)))) == 16
    assert "16 finished runs of part" in result.stderr
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert {json.loads(line)["status"] for line in lines} == {"finished"}
    assert len(lines) == 16


def test_compare(place) -> None:
    result = run(place, "compare", str(place / "part.yaml"), "--metric", "asr", "--format", "markdown")
    assert "- 8 cells in both, 0 only in A, 0 only in B" in result.stdout
    assert "clean accuracy" not in result.stdout
    parts = ["--only", "trigger=square", "--only-a", "applicator=image", "--only-b", "applicator=patch"]
    result = run(
        place, "compare", str(place / "part.yaml"), *parts, "--metric", "asr", "--format", "markdown"
    )
    assert "- 2 cells in both, 0 only in A, 0 only in B" in result.stdout
    assert "# suite part, version 3, trigger=square, applicator=image and suite part" in result.stdout
    assert "applicator.name: image in A, patch in B" in result.stdout
    with pytest.raises(
        BbmoeError, match=r"--only applicator\.name: value: unknown 'pach'; did you mean 'patch'"
    ):
        run(place, "compare", str(place / "part.yaml"), "--only-b", "applicator=pach")
    with pytest.raises(BbmoeError, match="--metric: metric: unknown 'acc'"):
        run(place, "compare", str(place / "part.yaml"), "--metric", "acc")


def test_a_line_for_each_run_counts_those_that_were_finished_before(tmp_path, capsys) -> None:
    suite = part_suite()
    specs = list(order(suite))
    for spec in specs[:3]:
        write(tmp_path, finished(spec))
    with make_display(suite, tmp_path, {specs[3].digest}, quiet=False) as display:
        for spec in specs[4:]:
            display.on_outcome(Outcome(spec.name, "finished"))
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"finished: {specs[4].name} \(5 of {len(specs)}, after .*\)", first)
    assert f"({len(specs)} of {len(specs)}, after" in last


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "trigger",
            {"name": "square", "size": {"a": 1}},
            "trigger 'square': size: expected an integer, got ",
        ),
        ("defenses", [{"name": "clp", "u": "x"}], "defense 'clp': u: expected a number, got 'x'"),
    ],
)
def test_a_table_without_runs_checks_the_options_of_parts(tmp_path, key, value, message) -> None:
    """In the words of `bench run`, whose check builds the parts."""
    (tmp_path / "runs").mkdir()
    base = {"recipe": "quick", "dataset": {"name": "signs", "train_images": 20, "test_images": 20}}
    suite = {"title": "T", "version": 1, "base": base, "grid": {"applicator": ["image"], key: [value]}}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(suite))
    for command, extra in (("table", ()), ("run", ("--dry-run",))):
        with pytest.raises(BbmoeError, match=f"^suite part: [^ ]+: {message}"):
            run(tmp_path, command, *extra)


def test_a_table_without_runs_needs_no_folder_of_the_data(tmp_path, place) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "part.yaml").write_text((place / "part.yaml").read_text())
    result = run(tmp_path, "table")
    assert result.exit_code == 0 and "missing" in result.stdout
