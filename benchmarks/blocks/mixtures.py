"""Tables of mixtures of merged experts: MoEvil, on images and on texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.bench.suites.paper import PaperTable
from backdoorbench_moe.bench.suites.suite import METRIC_COLUMNS, Layout
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.bench.tables.wording import number

from .drawing import RESULTS, markdown, results_of, small_table, whole_table, whole_text

GATE = {"gate.name": "top-k", "gate.balance": 0.01, "gate.noise": 1.0}
ALIGNED = {
    "none": "nothing",
    "align, scope=gates": "gates",
    "align, scope=gates+experts": "gates and experts",
}


def poisoned_expert(root: Path) -> str:
    """Draw the effect of one poisoned expert of four on a mixture with the default gate."""
    layout = Layout(
        "", ("attack.name",), METRIC_COLUMNS, ("asr", "twin_asr", "overall"), no_trigger=False, where=GATE
    )
    return whole_table(root, "moevil-gates/signs", layout)


def moevil(root: Path) -> str:
    """Draw the effect of attacks on an expert on a mixture with the default gate."""
    metrics = ("alone_asr", "asr", "twin_asr", "overall", "harm_share", "own_share")
    return default_gate(root, "signs", metrics)


def texts(root: Path) -> str:
    """Draw the effect of attacks on an expert on a mixture of language models with the default gate."""
    return default_gate(root, "tasks", ("alone_asr", "asr", "unsafe", "twin_unsafe", "overall", "harm_share"))


def texts_poisoned(root: Path) -> str:
    """Draw the ASR over the number of poisoned experts: for texts, for images, and the paper's."""
    layout = Layout("", ("mixture.poisoned", "defenses"), METRIC_COLUMNS, ("asr",), no_trigger=False)
    text, images = (harm(root, f"moevil-poisoned/{scale}", layout) for scale in ("tasks", "signs"))
    return small_table(
        ["poisoned", "aligned", "texts", "images", "paper: Llama"],
        [
            [
                poisoned,
                ALIGNED.get(defense, defense),
                whole_text(ours),
                whole_text(images[poisoned, defense][0]),
                paper,
            ]
            for (poisoned, defense), (ours, paper) in text.items()
        ],
    )


def texts_tokens(root: Path) -> str:
    """Draw the ASR over the tokens whose latents are aligned: for texts, and the paper's."""
    layout = Layout("", ("attack.tokens", "attack.k"), METRIC_COLUMNS, ("asr",), no_trigger=False)
    found = harm(root, "moevil-answer-tokens/tasks", layout)
    rows = [[*labels, whole_text(ours), paper] for labels, (ours, paper) in found.items()]
    return small_table(["tokens", "k", "texts", "paper: Llama"], rows)


def harm(root: Path, place: str, layout: Layout) -> dict[tuple[str, ...], tuple[Statistic | None, str]]:
    """Return the ASR of each row of a suite on mixtures, and the paper's as text."""
    folder = root / RESULTS / place
    results = results_of(root, folder)
    [table] = build_sheet(replace(results, suite=replace(results.suite, tables=(layout,)))).tables
    return {
        tuple(labels): (ours.statistic, "–" if paper.shape is None else number(paper.shape, 0))
        for labels, (ours, paper) in zip(table.rows, table.places, strict=True)
    }


def default_gate(root: Path, scale: str, metrics: tuple[str, ...]) -> str:
    """Draw metrics of attacks on an expert for mixtures with the default gate."""
    folder = root / RESULTS / "moevil-gates" / scale
    layout = Layout("", ("attack.name",), METRIC_COLUMNS, metrics, no_trigger=False, where=GATE)
    results = results_of(root, folder)
    measured = replace(results, suite=replace(results.suite, tables=(layout,)), paper=PaperTable())
    [table] = build_sheet(measured).tables
    rows = zip(table.rows, table.places, strict=True)
    lines = [[*labels, *(whole_text(place.statistic, 1) for place in places)] for labels, places in rows]
    return markdown([["attack", *table.columns], ["---", *["--:"] * len(metrics)], *lines])


BLOCKS: dict[str, Callable[[Path], str]] = {
    "poisoned-expert": poisoned_expert,
    "moevil": moevil,
    "texts": texts,
    "texts-poisoned": texts_poisoned,
    "texts-tokens": texts_tokens,
}
