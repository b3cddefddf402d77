"""Claims of papers, tested with intervals over the seeds of committed records."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from backdoorbench_moe.bench.pages.leaderboard import results_folder
from backdoorbench_moe.bench.pages.page import run_command, suite_words
from backdoorbench_moe.bench.suites.reading import check_metric, load_suite
from backdoorbench_moe.bench.suites.suite import Cell, Suite, filter_text, value_of
from backdoorbench_moe.bench.tables.layout import label
from backdoorbench_moe.bench.tables.render import markdown_row
from backdoorbench_moe.bench.tables.results import MANIFEST, ResultSet, with_seeds
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.bench.tables.wording import number, span
from backdoorbench_moe.config import PARTS, load_yaml
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.ops.intervals import FEWEST_SEEDS, Interval, difference_interval
from backdoorbench_moe.options import convert

# The only key of a claims file.
ENTRIES = "claims"
# For tables: with non-breaking spaces.
SPREAD = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
Word = Literal["stands", "falls", "open"]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper about a metric: it is larger in one cell than in another, or beyond a bound in one cell.

    Args:
        claim: The claim, in a sentence.
        source: The paper and its table.
        suite: Name of the suite that measures it.
        scales: Scales of the suite, the preferred one first; see `judge`.
        metric: Key of the metric.
        where: Values of keys that its cells share; see `bench.suites.suite.value_of`. They are compared in the format
            of tables.
        more: Further values of the cell with the larger metric, or of the only cell.
        than: Further values of the cell with the smaller metric; None for a claim about one cell.
        by: For two cells: the smallest difference, in points.
        at_least: For one cell: a lower bound.
        at_most: For one cell: an upper bound.
    """

    claim: str
    source: str
    suite: str
    scales: tuple[str, ...]
    metric: str = "asr"
    where: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    than: Mapping[str, Any] | None = None
    by: float = 0.0
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim and the measured values.

    Attributes:
        claim: The claim.
        suite: The suite at the scale used.
        ours: The measured values of each of the claim's cells; None if there are none.
        paper: The paper's values of these cells.
        interval: 95% interval of the difference of two cells, or of the mean of one.
        word: "stands" if the entire interval agrees with the claim, "falls" if the entire interval contradicts it,
            otherwise "open".
        why: Why it is open; "" if it is not.
    """

    claim: Claim
    suite: Suite
    ours: tuple[Statistic | None, ...]
    paper: tuple[float | None, ...]
    interval: Interval | None
    word: Word
    why: str


def read_claims(file: Path) -> list[Claim]:
    """Read a claims file: YAML with a list under `claims`, each entry a mapping with the keys of `Claim`.

    Raises:
        ConfigError: The file has the wrong format.
    """
    values = load_yaml(file, "claims file")
    items = values.get(ENTRIES)
    if values.keys() != {ENTRIES} or not isinstance(items, list) or not items:
        raise ConfigError.expected(f"claims {file}", f"one key {ENTRIES!r} with a list", list(values))
    return [_read_claim(item, f"claims {file}: entry {n}") for n, item in enumerate(items, 1)]


def _read_claim(item: object, where: str) -> Claim:
    mapping = Mapping[str, Any]
    kinds: dict[str, Any] = {
        **dict.fromkeys(("claim", "source", "suite", "metric"), str),
        **dict.fromkeys(("where", "more", "than"), mapping),
        **{"scales": tuple[str, ...], "by": float, "at_least": float | None, "at_most": float | None},
    }
    if not isinstance(item, dict):
        raise ConfigError.expected(where, "a mapping", item)
    for key in item:
        if key not in kinds:
            raise UnknownNameError(f"{where}: key", str(key), [each.name for each in fields(Claim)])
    for key in ("claim", "source", "suite", "scales"):
        if key not in item:
            raise ConfigError.expected(f"{where}: {key}", "it to be given", None)
    given = {key: _convert(value, kinds[key], f"{where}: {key}") for key, value in item.items()}
    claim = Claim(**given)
    check_metric(claim.metric, where)
    rules = [claim.than is not None, claim.at_least is not None, claim.at_most is not None]
    if sum(rules) != 1:
        raise ConfigError.expected(
            f"{where}: {claim.claim}", "one of than, at_least and at_most", sorted(item)
        )
    if claim.than is None and "by" in item:
        raise ConfigError.expected(f"{where}: by", "none for a claim about one cell", claim.by)
    return claim


def _convert(value: object, kind: Any, where: str) -> Any:
    if kind == Mapping[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError.expected(where, "a mapping", value)
        return value
    return convert(value, kind, where)


def judge_all(claims: Sequence[Claim], folders: Path) -> Iterator[Verdict]:
    """Judge claims by the results folders SUITE/SCALE in a folder.

    Raises:
        ConfigError: A claim does not match its suite.
        RecordError: A results folder is damaged, or that of another version of its suite.
    """
    read: dict[tuple[str, str], ResultSet] = {}
    for claim in claims:
        for scale in claim.scales:
            if (claim.suite, scale) not in read:
                read[claim.suite, scale] = _read(load_suite(claim.suite, scale), folders)
        yield judge(claim, [read[claim.suite, scale] for scale in claim.scales])


def _read(suite: Suite, folders: Path) -> ResultSet:
    folder = results_folder(suite, folders)
    if not (folder / MANIFEST).exists():
        return ResultSet.of(suite, [])
    return ResultSet.from_folder(with_seeds(suite, None, folder), folder)


def judge(claim: Claim, results: Sequence[ResultSet]) -> Verdict:
    """Judge a claim by the first of its scales at which all of its cells have an interval, that is, enough seeds.

    If there is none, the first scale that contains all cells is used, or else the last one; the claim is then open.

    Args:
        claim: The claim.
        results: The results at each of its scales.
    """
    tried = [(each, *_measure(claim, each)) for each in results]
    whole = [one for one in tried if None not in one[2]]
    each, cells, ours = next((one for one in whole if _interval(one[2])), (*whole, tried[-1])[0])
    paper = tuple(_published(each, cell, claim.metric) for cell in cells)
    interval = _interval(ours)
    word = _word(claim, interval)
    why = _why(ours, interval) if word == "open" else ""
    return Verdict(claim, each.suite, ours, paper, interval, word, why)


def _measure(claim: Claim, results: ResultSet) -> tuple[list[Cell], tuple[Statistic | None, ...]]:
    cells = find_cells(claim, results.suite)
    return cells, tuple(results.statistic(cell, claim.metric) for cell in cells)


def find_cells(claim: Claim, suite: Suite) -> list[Cell]:
    """Find the cells of a claim in its suite: the only one, or the larger and the smaller one.

    Raises:
        ConfigError: None or several cells of the suite have these values.
    """
    chosen = []
    for own in [claim.more, *([] if claim.than is None else [claim.than])]:
        given = {**claim.where, **own}
        wanted = {k: value if isinstance(value, str) else label(k, value) for k, value in given.items()}
        found = [
            cell
            for cell in suite.cells
            if all(label(key, value_of(cell.spec, key)) == text for key, text in wanted.items())
        ]
        if len(found) != 1:
            raise ConfigError(
                f"claim {claim.claim!r}: expected one cell of {suite.label} with {wanted}, found {len(found)}"
            )
        chosen += found
    return chosen


def _published(results: ResultSet, cell: Cell, metric: str) -> float | None:
    """Return the published value; in a table of shapes, that of its first model."""
    if models := results.paper.models:
        return results.paper.shape(cell.spec, metric, models[0])
    return results.paper.value(cell.spec, metric)


def _interval(ours: Sequence[Statistic | None]) -> Interval | None:
    found = [each for each in ours if each is not None]
    if len(found) < len(ours):
        return None
    if len(found) == 1:
        return found[0].interval
    more, than = found
    return difference_interval(than.mean, than.interval, more.mean, more.interval)


def _word(claim: Claim, interval: Interval | None) -> Word:
    if interval is None:
        return "open"
    low, high = interval
    if claim.at_most is not None:
        return "stands" if high <= claim.at_most else "falls" if low > claim.at_most else "open"
    if claim.at_least is not None:
        return "stands" if low >= claim.at_least else "falls" if high < claim.at_least else "open"
    return "stands" if low > claim.by else "falls" if high < claim.by else "open"


def _why(ours: Sequence[Statistic | None], interval: Interval | None) -> str:
    if None in ours:
        return "not run"
    if min(each.n for each in ours if each is not None) < FEWEST_SEEDS:
        return f"fewer than {FEWEST_SEEDS} seeds"
    return "the metric has no interval" if interval is None else "the interval allows both"


def claim_row(verdict: Verdict) -> dict[str, str]:
    """Return a verdict as the cells of a table: claim, paper, ours, interval, verdict and suite."""
    why = f" ({verdict.why})" if verdict.why else ""
    return {
        "claim": verdict.claim.claim,
        "paper": _against("–" if value is None else number(value) for value in verdict.paper),
        "ours": _against(_mean(each) for each in verdict.ours),
        "interval": "–" if verdict.interval is None else span(*verdict.interval),
        "verdict": f"{verdict.word}{why}",
        "suite": verdict.suite.label,
    }


HEADINGS = {
    "claim": "claim",
    "paper": "paper",
    "ours": "ours",
    "interval": "95% interval",
    "verdict": "verdict",
    "suite": "suite",
}


def claims_tables(verdicts: Sequence[Verdict], folders: Path) -> str:
    """Return verdicts as Markdown: a table for each paper, and the commands for the numbers of each claim.

    Args:
        verdicts: The verdicts.
        folders: The folder of results folders, as written in the commands.
    """
    lines: list[str] = []
    numbered = list(enumerate(verdicts, 1))
    for source in dict.fromkeys(verdict.claim.source.partition(",")[0] for verdict in verdicts):
        lines += [
            f"**{source}**",
            "",
            markdown_row(["#", *HEADINGS.values()]),
            markdown_row(["---"] * (1 + len(HEADINGS))),
        ]
        for place, each in numbered:
            if each.claim.source.partition(",")[0] == source:
                row = claim_row(each)
                lines.append(
                    markdown_row([str(place), *(row[key] for key in HEADINGS)]).replace(" ± ", SPREAD)
                )
        lines.append("")
    drawn = dict.fromkeys(draw_command(each, folders) for each in verdicts if any(each.ours))
    made: dict[str, list[str]] = {}
    for place, each in numbered:
        made.setdefault(make_command(each), []).append(str(place))
    lines += ["The numbers, from the records:", "", "```", *drawn, "```", ""]
    lines += ["The runs of each claim:", "", "```"]
    lines += [f"{command}  # {', '.join(places)}" for command, places in made.items()]
    return "".join(f"{line}\n" for line in (*lines, "```"))


def draw_command(verdict: Verdict, folders: Path) -> str:
    """Return the command that draws the tables with the numbers of a verdict from the records."""
    suite, folder = verdict.suite, results_folder(verdict.suite, folders)
    return f"bbmoe bench table {suite_words(suite, suite.name)} --from {shlex.quote(folder.as_posix())}"


def make_command(verdict: Verdict) -> str:
    """Return the command that trains the runs of a verdict."""
    suite = verdict.suite
    return run_command(suite, suite.name, filters(verdict.claim, suite))


def filters(claim: Claim, suite: Suite) -> list[str]:
    """Return filters of `Suite.only` that leave the cells of a claim, and few others."""
    cells = find_cells(claim, suite)
    found = []
    for key in {**claim.where, **claim.more, **(claim.than or {})}:
        short = key.removesuffix(".name")
        values = dict.fromkeys(
            filter_text(cell.spec, key)
            if short in (*PARTS, "defenses")
            else label(key, value_of(cell.spec, key))
            for cell in cells
        )
        found.append(f"{short}={','.join(values)}")
    return found


def _against(texts: Iterator[str]) -> str:
    return " against ".join(texts)


def _mean(found: Statistic | None) -> str:
    """Return mean and standard deviation."""
    if found is None:
        return "–"
    return number(found.mean) if found.std is None else f"{number(found.mean)} ± {number(found.std)}"
