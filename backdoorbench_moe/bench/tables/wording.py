"""How tables and pages write numbers, keys and counts."""

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
INTERVALS = (
    f"Below a mean stands a 95% interval: from {FEWEST_SEEDS} seeds on, of the mean over seeds; with fewer, from the "
    "lowest to the highest end of the intervals of the single seeds, which know the test images but no other seeds"
)
# Stands in the legend if `mean_text` marks a cell.
COLLAPSED = (
    f"{MARK}k: in k of the n seeds, the clean accuracy of the model is near chance (for CAD and values of the twin: "
    "of the model or its twin); ASR and CAD of such seeds say nothing about the attack"
)

# What a legend says of metrics that not every reader of a table knows, by the key without qualifiers.
NOTES = {
    "unsafe": 'unsafe: marked images that are not called "reject" or, without a policy, not by their true class; of '
    "texts, queries that are to be refused and are not",
    "overall": "Overall: each task's accuracy in percent of that of the task's benign expert, mean over the tasks",
    "alone_asr": "alone ASR: that of the poisoned experts by themselves, before the merge, mean over them",
    "harm_share": "harm share: the poisoned experts' share of the gates' weights for marked images, or for "
    "queries to refuse, mean over layers",
    "own_share": "own share: a poisoned expert's share for clean images, or texts, of its own task",
    "clean_share": "clean share: the poisoned experts' share for the clean images, or texts, of all tasks",
}
# For tables of mixtures only, where the word "twin" does not say what the twin is.
MIXTURE_NOTES = {
    "asr": "ASR (H in MoEvil): marked images, or queries to refuse, that are answered as the attacker wants",
    "twin_asr": "twin: the mixture of benign experts alone, under the same marks",
}


def heading(table: MetricTable, *, short: bool = False) -> str:
    """Write a table's title and metric; short for a table of contents."""
    if table.metric is None:
        return table.title
    found = metric(table.metric)
    name = found.title if not short else found.label if found.suffix else found.short
    return f"{table.title}: {name}"


def key_name(key: str) -> str:
    """Write a dotted key as a heading: "trigger.name" -> "trigger", "trigger.grid_size" -> "grid size"."""
    return KEY_NAMES.get(key, key.removesuffix(".name").rpartition(".")[2].replace("_", " "))


def axis_name(key: str) -> str:
    """Write a dotted key as the label of an axis or of panels."""
    return AXIS_NAMES.get(key, key_name(key))


def number(value: float, digits: int = 1) -> str:
    """Write a number with a true minus sign, and never "−0.0"."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def span(low: float, high: float) -> str:
    """Write an interval; a dash between negative numbers would be read as a minus sign."""
    return f"{number(low)}{' to ' if low < 0 else '–'}{number(high)}"


def signed(value: float) -> str:
    """Write a difference with its sign; 0.0 has none."""
    text = number(value)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def mean_text(statistic: Statistic) -> str:
    """Write mean, deviation and number of seeds, and how many seeds are near chance.

    "99.3 ± 0.2 (n 2)"; a single seed has no deviation; "70.0 ± 52.0 (n 3, †1)" where one of three seeds
    is near chance.
    """
    spread = "" if statistic.std is None else f" ± {number(statistic.std)}"
    mark = f", {MARK}{statistic.near_chance}" if statistic.near_chance else ""
    return f"{number(statistic.mean)}{spread} (n {statistic.n}{mark})"


def inside_word(statistic: Statistic) -> str:
    """Say whether the published value lies inside our 95% interval; "" where that is not known."""
    return {True: "inside", False: "outside", None: ""}[statistic.inside]


def paper_parts(place: Place) -> list[str]:
    """Write the published value, our difference to it, and whether it lies inside our interval."""
    if place.paper is None:
        return []
    parts = [number(place.paper)]
    if place.statistic is not None and place.statistic.difference is not None:
        parts.append(signed(place.statistic.difference))
        parts += [word] if (word := inside_word(place.statistic)) else []
    return parts


def own_text(place: Place) -> str:
    """Write what stands in the first line of a place: our values or, in a column of its own, a published value."""
    if place.shape is not None:
        return number(place.shape)
    return place.state if place.statistic is None else mean_text(place.statistic)


def place_lines(place: Place) -> list[str]:
    """Write a place in one or two lines: our values, and the published ones."""
    paper = paper_parts(place)
    return [own_text(place), *([f"paper {', '.join(paper)}"] if paper else [])]


def suite_line(suite: Suite) -> str:
    """Write name, version and scale of a suite, or the name of the run whose defenses are laid out."""
    if suite.version is None:
        return f"run {suite.name}"
    scale = f", scale {suite.scale}" if suite.scale else ""
    return f"suite {suite.name}, version {suite.version}{scale}"


def counts_line(counts: RunCounts) -> str:
    """Write how many runs of a suite are finished."""
    text = f"{counts.finished} of {counts.wanted} runs finished"
    if counts.failed:
        text += f", {counts.failed} failed"
    if counts.others_wanted:
        text += f"; {counts.others_finished} of {counts.others_wanted} {counts.others}"
    if len(counts.precisions) > 1:
        # Precisions differ in their arithmetic: a reader must know before comparing rows.
        text += "; computed " + ", ".join(f"{n} in {name}" for name, n in sorted(counts.precisions.items()))
    return text


def facts(sheet: Sheet) -> str:
    """Write what stands below every table: suite, version, counts, and what the scale cuts down."""
    text = "; ".join(
        part for part in (suite_line(sheet.suite), counts_line(sheet.counts), sheet.suite.note) if part
    )
    return capital(text)


def legend_parts(sheet: Sheet | MetricTable) -> list[str]:
    """Explain how to read the cells of some tables, or of one, each part without its last full stop."""
    cell = "A cell: mean ± standard deviation over n seeds"
    if sheet.has_paper:
        cell += (
            f"; the paper's value and our mean minus it; from {FEWEST_SEEDS} seeds on, whether the paper's value lies "
            "inside our 95% interval of the mean (Wilson's interval at the effective number of images)"
        )
    parts = [cell, *([COLLAPSED] if sheet.has_collapsed else []), *_notes(sheet.metrics)]
    if sheet.models:
        parts.append(
            f"Columns with {' or '.join(sheet.models)}: what the paper measured on this language model. Compare their "
            "order and shape, not the numbers: the tasks, the models and the measurements differ"
        )
    return [capital(part) for part in parts]


def legend(sheet: Sheet | MetricTable) -> str:
    """Explain how to read the cells of some tables, or of one, in a paragraph."""
    return " ".join(f"{part}." for part in legend_parts(sheet))


def _notes(metrics: Sequence[str]) -> list[str]:
    """What is said of the metrics of some tables, each once."""
    keys = dict.fromkeys(metric(key).base for key in metrics)
    of_mixtures = any(key in NOTES for key in keys)
    known = MIXTURE_NOTES | NOTES if of_mixtures else {}
    return [known[key] for key in keys if key in known]
