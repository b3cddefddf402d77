"""Progress as plain lines, wherever they are printed."""

from __future__ import annotations

import io

from backdoorbench_moe.engine.progress import lines
from backdoorbench_moe.engine.progress.lines import LineObserver


def test_a_finished_run_is_announced_and_a_wait_once() -> None:
    file = io.StringIO()
    observer = LineObserver(file)
    observer.on_found("a")
    for folder in ("b", "b", "c"):
        observer.on_wait(folder)
    assert file.getvalue().splitlines() == [
        "found finished: a",
        "waiting for another process in b",
        "waiting for another process in c",
    ]


def test_progress_is_a_line_at_each_tenth_with_the_time_left(monkeypatch) -> None:
    """Steps of two seconds; a name anew, and fewer steps done, are another search."""
    now = [0.0]
    monkeypatch.setattr(lines.time, "perf_counter", lambda: now[0])
    file = io.StringIO()
    observer = LineObserver(file)
    for done in range(1, 41):
        now[0] += 2
        observer.on_progress("anp", done, 40)
    observer.on_progress("rnp", 1, 2)
    now[0] += 3
    observer.on_progress("rnp", 2, 2)
    observer.on_progress("rnp", 1, 2)
    printed = file.getvalue().splitlines()
    assert printed[:2] == ["anp: 10%, 72 s left", "anp: 20%, 64 s left"] and printed[9] == "anp: 100%"
    assert printed[10:] == ["rnp: 50%", "rnp: 100%", "rnp: 50%"]


def test_a_message_that_cannot_be_printed_does_not_end_the_run() -> None:
    written = io.BytesIO()
    observer = LineObserver(io.TextIOWrapper(written, encoding="ascii"))
    observer.on_message("Épée")
    observer.on_message("a line")
    assert written.getvalue().splitlines()[-1] == b"a line"
    closed = io.StringIO()
    closed.close()
    LineObserver(closed).on_message("a line")
