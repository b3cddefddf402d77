"""`bbmoe bench page`: what it writes and refuses."""

from __future__ import annotations

import html
import shlex
import shutil
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_page_of_committed_records_and_of_a_suite_that_was_not_run(bbmoe, tmp_path) -> None:
    results = tmp_path / "results"
    shutil.copytree(Path(__file__).parents[2] / "benchmarks" / "results" / "defenses", results / "defenses")
    file = tmp_path / "docs" / "board.html"
    words = ["bench", "page", "defenses:small", "false-alarms:quick"]
    code, out, err = bbmoe(*words, "--from", results, "--save", file)
    assert (code, out) == (0, "") and f"page: {file}" in err
    text = file.read_text(encoding="utf-8")
    assert "Suite defenses, version 2, scale small: 34 of 34 runs finished" in text
    assert "Suite false-alarms, version 3, scale quick: 0 of 44 runs finished" in text and "missing" in text
    address = ["--repeats", 2, "--published", "https://host"]
    shown = bbmoe(*words, "--from", results, *address)[1]
    assert shown.count("https://host/defenses/small/records.jsonl#L") >= 20
    assert bbmoe(*printed_command(shown))[1] == shown, "the command on the page gives the page"
    again = printed_command(text)
    file.unlink()
    bbmoe(*again)
    assert file.read_text(encoding="utf-8") == text


def printed_command(page: str) -> list[str]:
    """The words after `bbmoe` of the command that draws a page, as the page itself shows it."""
    [line] = [line for line in html.unescape(page).splitlines() if "bbmoe bench page" in line]
    return shlex.split(line.partition("bbmoe ")[2].partition("<")[0])


@pytest.mark.slow
def test_the_command_on_the_leaderboard_of_the_documentation_gives_it(bbmoe, tmp_path, monkeypatch) -> None:
    root = Path(__file__).parents[2]
    page = root / "docs" / "pages" / "assets" / "leaderboard.html"
    text = page.read_text(encoding="utf-8")
    *words, name, file = printed_command(text)
    assert (name, root / file) == ("--save", page)
    for folder in ("benchmarks", "plugins"):
        (tmp_path / folder).symlink_to(root / folder)
    monkeypatch.chdir(tmp_path)
    assert bbmoe(*words, name, file)[0] == 0
    assert (tmp_path / file).read_text(encoding="utf-8") == text


BAD = {
    "no suite": (["nothing"], "suite: unknown 'nothing'"),
    "no scale": (["false-alarms:tiny"], "scale: unknown 'tiny'"),
    "no folder": (["false-alarms", "--from", "nowhere"], "--from nowhere: expected a folder of results folders"),
    "address": (["false-alarms", "--published", "https://host"], "--published: can only be used with --from"),
    "repeats": (["false-alarms", "--repeats", "0"], "repeats: expected at least 1"),
    "no runs": (["false-alarms", "--output", "nowhere"], "--output nowhere: expected a folder of run folders"),
    "mixtures": (["moevil-layers", "--output", "."], "contains mixtures of merged experts"),
    "nothing given": ([], "Missing argument 'SUITE...'"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(bbmoe, tmp_path, monkeypatch, args, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bbmoe("bench", "page", *args)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err
    assert "Usage" in err or err.count("\n") == 1
