"""Tables as text: what a cell says, escaping, widths, and that every table says what it is of."""

from __future__ import annotations

import csv
import io
import re

import pytest
from fake_runs import fill, finished, part_suite, write
from rich.console import Console

from backdoorbench_moe.bench.suites.reading import load_suite
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.render import latex, markdown, plain, rich_tables, statistics_csv, tex
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.wording import number, signed, span


@pytest.fixture
def results(tmp_path) -> ResultSet:
    """Image, square: 0.5% with ASR 90.6, 90.7 and 90.8%, 10% with one seed; the paper has 90.7 and 99.1."""
    suite = part_suite(repeats=3)
    for spec, asr in zip(suite.cells[0].runs(3), (8154, 8163, 8172), strict=True):
        write(tmp_path, finished(spec, asr=asr))
    write(tmp_path, finished(suite.cells[1].spec, asr=9000))
    return ResultSet.from_runs(suite, tmp_path)


def drawn(results: ResultSet, width: int = 80, *, intervals: bool = False) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(rich_tables(results, intervals=intervals))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_numbers() -> None:
    assert [number(x) for x in (99.34, -0.04, 0.0, -1.25)] == ["99.3", "0.0", "0.0", "−1.2"]
    assert [signed(x) for x in (0.5, -0.5, 0.04, -0.04)] == ["+0.5", "−0.5", "0.0", "0.0"]


def test_markdown_cells(results) -> None:
    text = markdown(build_sheet(results))
    rows = [line for line in text.splitlines() if line.startswith("| image")]
    assert rows[0] == "| image | 0.5% | 90.7 ± 0.1 (n 3)<br>paper 90.7, 0.0, inside | missing<br>paper 8.2 |"
    assert rows[1] == "| image | 10% | 100.0 (n 1)<br>paper 99.1, +0.9 | missing<br>paper 93.8 |"
    assert text.count("Suite part, version 3; 4 of 24 runs finished; 0 of 3 clean twins.") == 2


@pytest.mark.slow
def test_note_version_and_counts_stand_with_every_table(tmp_path) -> None:
    results = ResultSet.from_runs(load_suite("badpatches-table1", "small"), tmp_path)
    tables = len(build_sheet(results).tables)
    assert tables == 3
    for text in (markdown(build_sheet(results)), latex(build_sheet(results))):
        assert len(re.findall("10,000 training images", text)) == tables
        assert len(re.findall("version 1, scale small; 0 of 180 runs finished", text)) == tables
    assert len(re.findall("10,000", drawn(results))) == tables


def test_runs_of_unlike_precision_are_told_apart(tmp_path) -> None:
    suite = part_suite()
    fill(suite, tmp_path)
    assert "computed" not in drawn(ResultSet.from_runs(suite, tmp_path))
    for spec in suite.cells[0].runs(2):
        write(tmp_path, finished(spec, precision="fp32"))
    text = " ".join(drawn(ResultSet.from_runs(suite, tmp_path)).split())
    assert "2 of 2 clean twins; computed 14 in bf16, 2 in fp32" in text


@pytest.mark.slow
def test_terminal_fits_80_columns_with_three_triggers(tmp_path) -> None:
    suite = load_suite("badpatches-table1", "small")
    # As wide as cells get: "100.0 ± 12.3 (n 5)", "100.0 −99.9 outside".
    for n, cell in enumerate(suite.cells):
        for spec in cell.runs(5 if n % 2 else 2):
            write(tmp_path, finished(spec, asr=(spec.seed % 2) * 3000 if n % 2 else 9000))
    lines = drawn(ResultSet.from_runs(suite, tmp_path)).splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split() for line in lines if line.startswith("applicator")]
    assert heads == [["applicator", "rate", "square", "blend", "warp"]] * 3
    assert [line for line in lines if "± 18.3 (n 5)" in line]


def test_terminal_says_ours_and_the_papers(results) -> None:
    lines = [line.split() for line in drawn(results).splitlines()]
    at = lines.index(["image", "0.5%", "90.7", "±", "0.1", "(n", "3)", "missing"])
    assert lines[at + 1] == ["paper", "90.7", "0.0", "inside", "8.2"]
    assert lines[at + 3] == ["paper", "99.1", "+0.9", "93.8"]


def test_a_table_wider_than_the_terminal_is_cut_between_columns(results) -> None:
    lines = [line.split() for line in drawn(results, 40).splitlines()]
    heads = [line for line in lines if line[:2] == ["applicator", "rate"]]
    assert heads[:2] == [["applicator", "rate", "square"], ["applicator", "rate", "warp"]]


def test_without_a_paper_nothing_is_said_of_one(tmp_path) -> None:
    suite = part_suite(paper=None)
    fill(suite, tmp_path)
    results = ResultSet.from_runs(suite, tmp_path)
    for text in (drawn(results), markdown(build_sheet(results)), latex(build_sheet(results))):
        assert "paper" not in text


def test_csv_is_tidy_and_holds_what_a_cell_holds(results) -> None:
    rows = list(csv.DictReader(io.StringIO(statistics_csv(results))))
    assert len(rows) == 8 * 2
    first = rows[0]
    assert (first["applicator"], first["trigger"], first["poison_rate_percent"]) == ("image", "square", "0.5")
    assert (first["metric"], first["mean"], first["n"], first["seeds"]) == ("asr", "90.7", "3", "0 1 2")
    assert (first["std"], first["paper"], first["difference"]) == ("0.1", "90.7", "0.0")
    assert first["inside"] == "inside"
    # 0.1 point over 3 seeds with Student's t, and Wilson's interval of 9,000 images: 90.7 ± 0.65.
    assert float(first["low"]) == pytest.approx(90.04, abs=0.02)
    assert float(first["high"]) == pytest.approx(91.32, abs=0.02)
    single = next(row for row in rows if row["poison_rate_percent"] == "10.0" and row["metric"] == "asr")
    assert (single["mean"], single["std"], single["low"], single["inside"]) == ("100.0", "", "", "unknown")
    missing = [row for row in rows if row["state"] == "missing"]
    # Six cells were not run; the other two have no clean twin.
    assert len(missing) == 12
    assert all((row["mean"], row["n"], row["inside"]) == ("", "0", "") and row["paper"] for row in missing)
    assert [row["state"] for row in rows if row["metric"] == "cad"][:2] == ["no clean twin"] * 2


def test_latex_says_cells_over_two_lines(results) -> None:
    text = latex(build_sheet(results))
    assert r"image & 0.5\% & 90.7 $\pm$ 0.1 (n 3) & missing \\" in text
    assert r" & \quad paper & 90.7, 0.0, inside & 8.2 \\ \addlinespace" in text
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 2
    rows = [line for line in text.splitlines() if line.endswith(r"\\") or line.endswith(r"\addlinespace")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {3}


def test_intervals_take_the_place_of_deviations_in_every_format(results) -> None:
    cell = next(c for c in results.suite.cells if (found := results.statistic(c, "asr")) and found.n == 3)
    statistic = results.statistic(cell, "asr")
    assert statistic is not None and statistic.shown is not None
    interval = span(*statistic.shown)
    sheet = build_sheet(results, intervals=True)
    for text in (markdown(sheet), drawn(results, 200, intervals=True)):
        assert f"90.7 [{interval}] (n 3)" in text
        assert " ± " not in text and "its 95% interval" in text
    assert f"90.7 {{[}}{tex(interval)}{{]}} (n 3)" in latex(sheet)


def test_latex_escapes_what_latex_reads() -> None:
    assert tex("a_b & 50% #1 {x} $y$") == r"a\_b \& 50\% \#1 \{x\} \$y\$"
    assert tex("\\foo~^") == r"\textbackslash{}foo\textasciitilde{}\textasciicircum{}"
    # Would be an argument of the line break of the row above.
    assert tex("[8, 8]*") == "{[}8, 8{]}{*}"
    assert tex("1\n2") == "1 2"
    assert tex("−1 ± 2 × 3 – 4").isascii()


def test_markdown_escapes_what_would_break_a_table() -> None:
    assert plain("a|b\nc") == r"a\|b c"
    assert plain("<script>&") == "&lt;script&gt;&amp;"
    assert plain("*a* `b`") == r"\*a\* \`b\`"


def test_titles_are_no_markup_in_the_terminal(tmp_path) -> None:
    suite = part_suite(title="[red]not markup[/red] [/]")
    assert "[red]not markup[/red] [/]" in drawn(ResultSet.from_runs(suite, tmp_path))
