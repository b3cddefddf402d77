"""Progress as plain lines, wherever they are printed."""

from __future__ import annotations

import io

from backdoorbench_moe.engine.progress.lines import LineObserver


def test_a_finished_run_is_announced_and_a_wait_once() -> None:
    file = io.StringIO()
    observer = LineObserver(file)
    observer.on_found("a")
    for folder in ("b", "b", "c"):
        observer.on_wait(folder)
    lines = file.getvalue().splitlines()
    assert lines == [
        "found finished: a",
        "waiting for another process in b",
        "waiting for another process in c",
    ]


def test_a_message_that_cannot_be_printed_does_not_end_the_run() -> None:
    written = io.BytesIO()
    observer = LineObserver(io.TextIOWrapper(written, encoding="ascii"))
    observer.on_message("Épée")
    observer.on_message("a line")
    assert written.getvalue().splitlines()[-1] == b"a line"
    closed = io.StringIO()
    closed.close()
    LineObserver(closed).on_message("a line")
