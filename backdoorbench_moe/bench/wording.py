"""How tables and pages say numbers, metrics, keys and counts."""

from __future__ import annotations

from backdoorbench_moe.bench.results import Statistic
from backdoorbench_moe.bench.suite import Suite
from backdoorbench_moe.bench.tables import Counts, MetricTable, Place, Sheet

MINUS = "−"
METRIC_NAMES = {
    "asr": ("attack success rate (ASR)", "%"),
    "ba": ("clean accuracy (BA)", "%"),
    "cad": ("clean accuracy drop (CAD)", "percentage points"),
    "ra": ("accuracy on triggered images (RA)", "%"),
    "auroc": ("area under the ROC curve (AUROC)", "%"),
    "tpr": ("triggered images rejected (TPR)", "%"),
    "fpr": ("clean images rejected (FPR)", "%"),
    "seconds": ("time", "s"),
}
KEY_NAMES = {
    "poison.rate": "rate",
    "dataset.name": "data set",
    "dataset": "data set",
    "train.epochs": "epochs",
}
AXIS_NAMES = {"poison.rate": "poisoning rate"}


def metric_name(metric: str, *, unit: bool = True) -> str:
    """ "pruned.asr" -> "attack success rate (ASR) after pruned, %"."""
    stage, _, name = metric.rpartition(".")
    text, measure = METRIC_NAMES[name]
    return f"{text}{f' after {stage}' if stage else ''}{f', {measure}' if unit else ''}"


def heading(table: MetricTable, *, short: bool = False) -> str:
    """A table's title and what it is of. short: for a table of contents."""
    if table.metric is None:
        return table.title
    name = metric_name(table.metric, unit=not short)
    return f"{table.title}: {table.metric.upper() if short and '.' not in table.metric else name}"


def key_name(key: str) -> str:
    """A dotted key as a heading: "trigger.name" -> "trigger", "trigger.grid_size" -> "grid size"."""
    return KEY_NAMES.get(key, key.removesuffix(".name").rpartition(".")[2].replace("_", " "))


def axis_name(key: str) -> str:
    """A dotted key as the label of an axis or of panels."""
    return AXIS_NAMES.get(key, key_name(key))


def number(value: float, digits: int = 1) -> str:
    """A number with a true minus sign; no "−0.0"."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float) -> str:
    """A difference with its sign; none for 0.0."""
    text = number(value)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def mean_text(statistic: Statistic) -> str:
    """ "99.3 ± 0.2 (n 2)"; a single seed has no deviation."""
    spread = "" if statistic.std is None else f" ± {number(statistic.std)}"
    return f"{number(statistic.mean)}{spread} (n {statistic.n})"


def inside_word(statistic: Statistic) -> str:
    """Whether the paper's value lies inside our 95% interval; "" where there is no such value."""
    if statistic.paper is None:
        return ""
    return {True: "inside", False: "outside", None: "unknown"}[statistic.inside]


def paper_parts(place: Place) -> list[str]:
    """The paper's value, our difference to it, and whether it lies inside our interval; [] without one."""
    if place.paper is None:
        return []
    parts = [number(place.paper)]
    if place.statistic is not None and place.statistic.difference is not None:
        parts += [signed(place.statistic.difference), inside_word(place.statistic)]
    return parts


def place_lines(place: Place) -> list[str]:
    """A place in one or two lines: ours, and the paper's."""
    ours = place.state if place.statistic is None else mean_text(place.statistic)
    paper = paper_parts(place)
    return [ours, *([f"paper {', '.join(paper)}"] if paper else [])]


def suite_line(suite: Suite) -> str:
    """Name, version and scale of a suite."""
    scale = f", scale {suite.scale}" if suite.scale else ""
    return f"suite {suite.name}, version {suite.version}{scale}"


def counts_line(counts: Counts) -> str:
    """How much of a suite was run."""
    text = f"{counts.finished} of {counts.wanted} runs finished"
    if counts.failed:
        text += f", {counts.failed} failed"
    if counts.others_wanted:
        text += f"; {counts.others_finished} of {counts.others_wanted} {counts.others}"
    if len(counts.precisions) > 1:
        # They are not the same arithmetic: a reader must know before comparing rows.
        text += "; computed " + ", ".join(f"{n} in {name}" for name, n in sorted(counts.precisions.items()))
    return text


def facts(sheet: Sheet) -> str:
    """What stands with every table: suite, version, counts, and what the scale cuts down."""
    text = "; ".join(
        part for part in (suite_line(sheet.suite), counts_line(sheet.counts), sheet.suite.note) if part
    )
    return text[0].upper() + text[1:]


def legend(*, has_paper: bool) -> str:
    """How to read a cell."""
    text = "A cell: mean ± standard deviation over n seeds"
    if not has_paper:
        return f"{text}."
    return (
        f"{text}; the paper's value, our mean minus it, and whether it lies inside our 95% interval of the "
        "mean (Student's t; unknown for a single seed, which has no interval)."
    )
