"""The leaderboard as one self-contained HTML page that can be sorted and filtered, and is readable without script."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from backdoorbench_moe.bench.pages.false_alarms import JUDGED, MODEL, Alarms, false_alarms
from backdoorbench_moe.bench.pages.found import Found, Link
from backdoorbench_moe.bench.pages.leaderboard import COLUMNS, Board, Row, Setting, Value, rows
from backdoorbench_moe.bench.pages.page import run_command
from backdoorbench_moe.bench.tables.layout import count_runs
from backdoorbench_moe.bench.tables.wording import INTERVALS, counts_line, number, signed, span, suite_line
from backdoorbench_moe.collapse import MARK
from backdoorbench_moe.drawing import render_page
from backdoorbench_moe.metrics import METRICS, POINTS
from backdoorbench_moe.wording.counting import capital, count

TITLE = "Leaderboard: attacks, defenses and models"
LEGEND = (
    f"Means over seeds in percent; differences in percentage points. {INTERVALS}. ASR is the share of triggered images "
    "that are classified as the target; no trigger, the share of the same images without the trigger; RA, the share of "
    "triggered images that are classified correctly. Behind a filter, a rejected image counts neither as correct (BA, "
    "RA) nor as a success of the attack (ASR). ASR − tuning and BA − tuning compare a defense with plain tuning: "
    "fine-tuning on the same number of images. AUROC, TPR and FPR refer to what a detector judges: inputs, training "
    "images or classes. The seeds link to their records. Unfinished runs are shown as missing."
)
NEAR_LEGEND = (
    "The clean accuracy of at least one seed is near chance, like that of a model that always predicts one class; its "
    "ASR says nothing about the attack or the defense."
)
ALARMS_LEGEND = (
    "What each detector flags in clean models of the same kind; every alarm is false. Input filters and most scores of "
    "training images flag a share by design."
)
FILTERS = (
    ("data", "data set"),
    ("model", "model"),
    ("trigger", "trigger"),
    ("applicator", "applicator"),
    ("defense", "defense"),
)


def leaderboard_page(
    board: Board, names: Sequence[str], link: Link, options: Mapping[str, object] | None = None
) -> str:
    """Return the page as self-contained HTML.

    Args:
        board: The results.
        names: The name of each suite in commands: name of the suite, or path of its file.
        link: Function that returns the address of a record, relative to the page.
        options: The options of `bbmoe bench page` that produce this page, by name, such as "from", for the command on
            the page; options that are None are left out.
    """
    templates = files("backdoorbench_moe.bench.pages") / "templates"
    script = (templates / "leaderboard.js").read_text(encoding="utf-8")
    shown, alarms = rows(board), false_alarms(board)
    settings = [row.setting for row in shown] + [row.setting for row in alarms]
    several = len({setting.data for setting in settings}) > 1
    return render_page(
        (templates / "leaderboard.html").read_text(encoding="utf-8"),
        title=TITLE,
        counts=_counts(shown, settings, several=several),
        suites=[_suite_line(results) for results in board.results],
        filters=list(_filters(settings)),
        legend=LEGEND,
        mark=MARK,
        near_legend=NEAR_LEGEND if any(row.near_chance for row in shown) else "",
        setting_names=[*(["data set"] if several else []), "model", "attack", "defense"],
        columns=[(METRICS[key].short, METRICS[key].title) for key in COLUMNS],
        rows=[_row(row, link, several=several) for row in shown],
        alarms_legend=ALARMS_LEGEND,
        alarm_names=[*(["data set"] if several else []), "model", "detector"],
        alarms=[_alarms(row, link, several=several) for row in alarms],
        commands=_commands(board, names, options or {}),
        script=_markup(script),
        script_hash=_hash(f"\n{script}"),
    )


def _counts(shown: Sequence[Row], settings: Sequence[Setting], *, several: bool) -> str:
    finished = sum(row.state == "finished" for row in shown)
    data = "" if several or not settings else f" on {settings[0].data}"
    return f"{count(len(shown), 'row')}{data}, {finished} of them measured."


def _suite_line(results: Any) -> str:
    suite = results.suite
    line = f"{capital(suite_line(suite))}: {counts_line(count_runs(results))}"
    return f"{line}; {suite.note}." if suite.note else f"{line}."


def _filters(settings: Iterable[Setting]) -> Iterable[tuple[str, str, list[str]]]:
    """Return the filters with more than one value: name, heading and values."""
    for name, heading in FILTERS:
        values = list(dict.fromkeys(getattr(setting, name) for setting in settings))
        if len(values) > 1:
            yield name, heading, values


def _row(row: Row, link: Link, *, several: bool) -> dict[str, Any]:
    cells = [
        {"mean": "", "state": row.states[key]}
        if key in row.states
        else _value(row.values[key], points=METRICS[key].unit == POINTS) | {"near": _near(row, key)}
        for key in COLUMNS
    ]
    return {
        "setting": row.setting,
        "labels": _labels(row.setting, several=several, attack=True),
        "seeds": row.seeds,
        "wanted": row.wanted,
        "state": row.state,
        "cells": cells if row.state == "finished" else [],
        "records": _records(row.records, link),
    }


def _near(row: Row, key: str) -> str:
    """Return the tooltip of the mark next to BA and ASR; "" if no model is near chance."""
    if key not in ("ba", "asr") or not row.near_chance:
        return ""
    return f"{row.near_chance} of {row.seeds} seeds near chance"


def _alarms(row: Alarms, link: Link, *, several: bool) -> dict[str, Any]:
    number_of = f"{row.judged:,} " if row.about != MODEL else ""
    return {
        "setting": row.setting,
        "labels": _labels(row.setting, several=several, attack=False),
        "seeds": row.seeds,
        "wanted": row.wanted,
        "state": row.state,
        "judged": f"{number_of}{JUDGED[row.about]}" if row.about else "",
        "rate": None if row.rate is None else _value(row.rate, points=False),
        "alarmed": row.alarmed,
        "alarmed_text": "–" if row.alarmed is None else f"{row.alarmed} of {row.seeds}",
        "records": _records(row.records, link),
    }


def _labels(setting: Setting, *, several: bool, attack: bool) -> list[tuple[str, str, str]]:
    """Return the labels of a row: CSS class, text, and options below."""
    labels = [("data", setting.data, "")] if several else []
    labels.append(("model", setting.model, ""))
    labels += [("attack", setting.attack, setting.attack_options)] if attack else []
    return [*labels, ("defense", setting.defense, setting.defense_options)]


def _value(value: Value, *, points: bool) -> dict[str, Any]:
    interval = value.interval
    return {
        "raw": f"{value.mean:.6f}",
        "mean": signed(value.mean) if points else number(value.mean),
        "interval": "" if interval is None else span(*interval),
        "near": "",
    }


def _records(records: Mapping[int, Found], link: Link) -> list[tuple[int, str]]:
    return [(seed, link(found)) for seed, found in records.items()]


def _commands(board: Board, names: Sequence[str], options: Mapping[str, object]) -> list[str]:
    lines, scaled = [], []
    for name, results in zip(names, board.results, strict=True):
        suite = results.suite
        lines.append(run_command(suite, name))
        scaled.append(shlex.quote(f"{name}:{suite.scale}" if suite.scale else name))
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*lines, " ".join(["bbmoe bench page", *scaled, *given])]


def _hash(script: str) -> str:
    """Return the hash with which the page's Content-Security-Policy allows only its own script."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return f"sha256-{digest}"


def _markup(script: str) -> Any:
    from markupsafe import Markup

    # The package's own file, which does not contain "</script>".
    return Markup(script)
