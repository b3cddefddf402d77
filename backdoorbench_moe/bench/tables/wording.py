"""Formatting of numbers, keys, counts and legends in tables and pages."""

from __future__ import annotations

from collections.abc import Sequence

from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.bench.tables.layout import MetricTable, Place, RunCounts, Sheet
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.collapse import MARK
from backdoorbench_moe.metrics import metric
from backdoorbench_moe.ops.intervals import FEWEST_SEEDS
from backdoorbench_moe.wording.counting import capital

MINUS = "−"
KEY_NAMES = {
    "poison.rate": "rate",
    "dataset.name": "data set",
    "dataset": "data set",
    "train.epochs": "epochs",
    "mixture.poisoned": "poisoned experts",
}
AXIS_NAMES = {"poison.rate": "poisoning rate"}
WHICH_INTERVAL = (
    f"with at least {FEWEST_SEEDS} seeds, that of the mean over seeds; with fewer, the range of the intervals of the "
    "single seeds, which cover the choice of test images but not of seeds"
)
INTERVALS = f"Below each mean is its 95% interval: {WHICH_INTERVAL}"
# Added to the legend if `mean_text` marks a cell.
COLLAPSED = (
    f"{MARK}k: in k of the n seeds, the clean accuracy of the model is near chance (for CAD and values of the twin, "
    "that of the model or its twin); ASR and CAD of these seeds say nothing about the attack"
)

# Explanations of less common metrics in legends, by the key without qualifiers.
NOTES = {
    "unsafe": 'unsafe: share of marked images not classified as "reject" or, without a policy, as their true class; '
    "for texts, share of queries to refuse that are not refused",
    "overall": "Overall: accuracy in percent of that of the task's benign expert, mean over tasks",
    "alone_asr": "alone ASR: ASR of the poisoned experts before the merge, mean over experts",
    "harm_share": "harm share: the poisoned experts' share of the gate weights for marked images, or for queries to "
    "refuse, mean over layers",
    "own_share": "own share: a poisoned expert's share for clean images, or texts, of its own task",
    "clean_share": "clean share: the poisoned experts' share for clean images, or texts, of all tasks",
}
# Only for tables of mixtures, where "twin" needs an explanation.
MIXTURE_NOTES = {
    "asr": "ASR (H in MoEvil): share of marked images classified as the target, or of queries to refuse that are "
    "answered harmfully",
    "twin_asr": "twin: the mixture of benign experts only, evaluated on the same marked images or queries",
}


def heading(table: MetricTable, *, short: bool = False) -> str:
    """Return a table's title and metric, in short form for a table of contents."""
    if table.metric is None:
        return table.title
    found = metric(table.metric)
    name = found.title if not short else found.label if found.suffix else found.short
    return f"{table.title}: {name}"


def key_name(key: str) -> str:
    """Format a dotted key as a heading: "trigger.name" -> "trigger", "trigger.grid_size" -> "grid size"."""
    return KEY_NAMES.get(key, key.removesuffix(".name").rpartition(".")[2].replace("_", " "))


def axis_name(key: str) -> str:
    """Format a dotted key as the label of an axis or of panels."""
    return AXIS_NAMES.get(key, key_name(key))


def number(value: float, digits: int = 1) -> str:
    """Format a number with a true minus sign, and never as "−0.0"."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def span(low: float, high: float) -> str:
    """Format an interval; negative numbers are separated by "to", as a dash would look like a minus sign."""
    return f"{number(low)}{' to ' if low < 0 else '–'}{number(high)}"


def signed(value: float) -> str:
    """Format a difference with its sign; 0.0 has none."""
    text = number(value)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def mean_text(statistic: Statistic, *, interval: bool = False) -> str:
    """Format mean, standard deviation and number of seeds, and how many seeds are near chance.

    For example, "99.3 ± 0.2 (n 2)", or "70.0 ± 52.0 (n 3, †1)" if one of three seeds is near chance. A single seed has
    no deviation. With `interval`, the 95% interval takes the place of the deviation, if there is one:
    "99.3 [98.9–99.5] (n 2)".
    """
    spread = "" if statistic.std is None else f" ± {number(statistic.std)}"
    if interval and statistic.shown is not None:
        spread = f" [{span(*statistic.shown)}]"
    mark = f", {MARK}{statistic.near_chance}" if statistic.near_chance else ""
    return f"{number(statistic.mean)}{spread} (n {statistic.n}{mark})"


def inside_word(statistic: Statistic) -> str:
    """Return whether the published value is "inside" or "outside" our 95% interval; "" if unknown."""
    return {True: "inside", False: "outside", None: ""}[statistic.inside]


def paper_parts(place: Place) -> list[str]:
    """Return the published value, our difference from it, and whether it lies inside our interval."""
    if place.paper is None:
        return []
    parts = [number(place.paper)]
    if place.statistic is not None and place.statistic.difference is not None:
        parts.append(signed(place.statistic.difference))
        parts += [word] if (word := inside_word(place.statistic)) else []
    return parts


def own_text(place: Place, *, interval: bool = False) -> str:
    """Return the first line of a place: our values or, in a column of published values, the published one.

    Args:
        place: The place.
        interval: Whether our mean is shown with its 95% interval instead of its standard deviation.
    """
    if place.shape is not None:
        return number(place.shape)
    return place.state if place.statistic is None else mean_text(place.statistic, interval=interval)


def place_lines(place: Place, *, interval: bool = False) -> list[str]:
    """Return the one or two lines of a place: our values (see `own_text`), and the published ones."""
    paper = paper_parts(place)
    return [own_text(place, interval=interval), *([f"paper {', '.join(paper)}"] if paper else [])]


def suite_line(suite: Suite) -> str:
    """Return name, version and scale of a suite, or the name of the run whose defenses are compared."""
    if suite.version is None:
        return f"run {suite.name}"
    scale = f", scale {suite.scale}" if suite.scale else ""
    return f"suite {suite.name}, version {suite.version}{scale}"


def counts_line(counts: RunCounts) -> str:
    """Return how many runs of a suite are finished, in words."""
    text = f"{counts.finished} of {counts.wanted} runs finished"
    if counts.failed:
        text += f", {counts.failed} failed"
    if counts.others_wanted:
        text += f"; {counts.others_finished} of {counts.others_wanted} {counts.others}"
    if len(counts.precisions) > 1:
        # Results in different precisions are not directly comparable.
        text += "; computed " + ", ".join(f"{n} in {name}" for name, n in sorted(counts.precisions.items()))
    return text


def facts(sheet: Sheet) -> str:
    """Return the line below every table: suite, version, numbers of runs, and the note of the scale."""
    text = "; ".join(
        part for part in (suite_line(sheet.suite), counts_line(sheet.counts), sheet.suite.note) if part
    )
    return capital(text)


def legend_parts(sheet: Sheet | MetricTable) -> list[str]:
    """Return the parts of the legend of one or several tables, without final full stops."""
    cell = "Each cell: mean ± standard deviation over n seeds"
    if sheet.intervals:
        cell = f"Each cell: mean over n seeds and, in brackets, its 95% interval ({WHICH_INTERVAL}); the "
        cell += "standard deviation where there is no interval"
    if sheet.has_paper:
        cell += (
            f"; the paper's value and our mean minus it; with at least {FEWEST_SEEDS} seeds, whether the paper's value "
            "lies inside our 95% interval of the mean (Wilson's interval at the effective number of images)"
        )
    parts = [cell, *([COLLAPSED] if sheet.has_collapsed else []), *_notes(sheet.metrics)]
    if sheet.models:
        parts.append(
            f"Columns with {' or '.join(sheet.models)}: values that the paper reports for this language model. "
            "Compare their order and shape, not the numbers: tasks, models and measurements differ"
        )
    return [capital(part) for part in parts]


def legend(sheet: Sheet | MetricTable) -> str:
    """Return the legend of one or several tables as a paragraph."""
    return " ".join(f"{part}." for part in legend_parts(sheet))


def _notes(metrics: Sequence[str]) -> list[str]:
    """Return the explanations of the metrics of some tables, each once."""
    keys = dict.fromkeys(metric(key).base for key in metrics)
    of_mixtures = any(key in NOTES for key in keys)
    known = MIXTURE_NOTES | NOTES if of_mixtures else {}
    return [known[key] for key in keys if key in known]
