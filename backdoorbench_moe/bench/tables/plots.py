"""Figures of a suite: a metric over a key, with one panel per value of another key, and published points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.bench.suites.suite import Plot, value_of
from backdoorbench_moe.bench.tables.layout import cell_labels, find_place
from backdoorbench_moe.bench.tables.record_metrics import uses_twin
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.bench.tables.wording import axis_name, key_name, number
from backdoorbench_moe.collapse import MARK
from backdoorbench_moe.drawing import (
    COLOURS,
    INK,
    MARKERS,
    PAPER,
    RULE,
    drawing_style,
    figure_bytes,
    new_figure,
    slug,
)
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.metrics import PERCENT
from backdoorbench_moe.metrics import metric as find_metric
from backdoorbench_moe.wording.counting import capital

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Transform

HOLLOW: dict[str, Any] = {"markerfacecolor": PAPER, "markersize": 7, "linestyle": ":", "linewidth": 0.8}
# Inches. The height of a panel includes the gap for its x label and the title of the panel below.
PANEL_WIDTH, PANEL_HEIGHT, GAP, LEFT, TOP, RIGHT = 3.1, 2.9, 0.75, 0.6, 0.58, 0.12
# Minimum width of a row of panels, as pages stretch figures to full width and a narrow one would get huge text; and the
# width of a legend entry in addition to its text.
NARROWEST_ROW, LEGEND_KEY = 5.6, 0.6
ACROSS, LEGEND_COLUMNS, NARROWEST, DPI = 3, 4, 0.2, 150
# Points, and the angle in degrees of names on the x axis.
TICK_SIZE, SLANT = 8, 60
# Offset in points between lines, so that markers and bars at the same x are next to each other: the largest, with which
# markers do not overlap, and the smallest; and the width of all lines up to which it is larger than the smallest.
SHIFT, LEAST_SHIFT, WIDEST_SHIFT = 5.0, 2.5, 10.0
# Metrics in percent that can exceed 100%: ratios of two accuracies.
RATIOS = ("overall",)


@dataclass(frozen=True)
class Point:
    """The measured and the published value at one x; either may be None.

    On an axis of names, `x` is the number of the name, from 0; on an axis of numbers, `name` is empty. If the paper
    only has values for another kind of model, the published value is that of the first such model.
    """

    x: float
    statistic: Statistic | None
    paper: float | None
    name: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel: its title, and the points of each line in ascending order of x, by the line's label."""

    label: str
    lines: dict[str, list[Point]]


def build_panels(results: ResultSet, plot: Plot) -> list[Panel]:
    """Collect the panels of a figure, with rates in percent.

    Raises:
        ConfigError: Two cells share a point, or an x is not a number (on a log axis, not a positive one).
    """
    where = f"suite {results.suite.name}: plot {plot.title!r}"
    panels: dict[str, dict[str, dict[float, Point]]] = {}
    names: dict[str, int] = {}
    labels = (cell_labels(results.suite, key) for key in (plot.x, plot.panels, plot.lines))
    for cell, name, panel, line in zip(results.suite.cells, *labels, strict=True):
        if not plot.shows(cell.spec):
            continue
        if plot.scale == "names":
            x: float = names.setdefault(name, len(names))
        else:
            name, x = "", _number(value_of(cell.spec, plot.x), plot, where)
        points = panels.setdefault(panel, {}).setdefault(line, {})
        if x in points:
            raise ConfigError(
                f"{where}: {dict(cell.values)} would share its point with another cell; expected panels or "
                "lines over a key that tells them apart"
            )
        place = find_place(results, cell, plot.metric)
        shapes = (results.paper.shape(cell.spec, plot.metric, model) for model in results.paper.models[:1])
        points[x] = Point(x, place.statistic, next(shapes, place.paper), name)
    return [
        Panel(name, {line: [points[x] for x in sorted(points)] for line, points in lines.items()})
        for name, lines in panels.items()
    ]


def _number(x: object, plot: Plot, where: str) -> float:
    """Return a value on a numeric axis, rates in percent. Raises ConfigError if it cannot be shown there."""
    log = plot.scale == "log"
    if not isinstance(x, int | float) or isinstance(x, bool) or (log and x <= 0):
        expected = "positive numbers, for a log axis" if log else "numbers"
        advice = "" if isinstance(x, int | float) else "; for names, use scale: names"
        raise ConfigError(f"{where}: {plot.x}: expected {expected}, got {x!r}{advice}")
    return 100 * x if plot.x == "poison.rate" else x


def draw(results: ResultSet, plot: Plot, form: str) -> bytes:
    """Draw a figure as an "svg" or "png" file; equal records give equal bytes."""
    panels = build_panels(results, plot)
    with drawing_style(plot.title):
        return figure_bytes(build_figure(panels, plot, _source(results)), form, DPI)


def describe(results: ResultSet, plot: Plot) -> str:
    """Describe a figure in one sentence: its caption."""
    text = f"{capital(find_metric(plot.metric).label)} over the {axis_name(plot.x)}"
    text += f", one panel per {key_name(plot.panels)}"
    panels = build_panels(results, plot)
    points = _points(panels)
    if any(point.statistic and point.statistic.n > 1 for point in points):
        text += "; bars are one standard deviation over seeds"
        text += " (but end at 0 and 100%)" if any(_is_cut(p.statistic, plot.metric) for p in points) else ""
        text += ", points without bars single seeds"
    elif any(point.statistic for point in points):
        text += "; single seeds, therefore without bars"
    if any(_has_collapsed(point) for point in points):
        twins = " or its twin" if uses_twin(plot.metric) else ""
        text += f"; {MARK}: the clean accuracy of at least one seed{twins} is near chance"
    if any(point.paper is not None for point in points):
        text += f"; hollow markers are {_whose(results)}"
    return f"{text}."


def _source(results: ResultSet) -> str:
    """Return the source of the published values: the paper, with the model if it is of another kind."""
    return next((f"paper, {model}" for model in results.paper.models), "paper")


def _whose(results: ResultSet) -> str:
    models = results.paper.models
    return f"the paper's for {models[0]}, to compare the shape only" if models else "the paper's"


def alt_text(results: ResultSet, plot: Plot) -> str:
    """Describe a figure for readers who cannot see it: the ends of every line, or the value at every name."""
    texts = []
    for panel in build_panels(results, plot):
        for line, points in panel.lines.items():
            found = [f"{number(p.statistic.mean)} at {_x(plot, p)}" for p in points if p.statistic]
            if plot.scale == "names":
                said = ", ".join(found)
            else:
                said = " to ".join([found[0], found[-1]] if len(found) > 1 else found)
            said = said or "nothing measured"
            texts.append(f"{panel.label}, {line}: {said}")
    return f"{capital(find_metric(plot.metric).title)}. {'; '.join(texts)}."


def file_names(plots: Sequence[Plot]) -> list[str]:
    """Choose a unique file name, without suffix, for each figure."""
    names: list[str] = []
    for plot in plots:
        name = slug(plot.title) or "plot"
        tried = (f"{name}-{n}" for n in itertools.count(2))
        names.append(name if name not in names else next(text for text in tried if text not in names))
    return names


def build_figure(panels: Sequence[Panel], plot: Plot, source: str) -> Figure:
    """Build a figure inside `drawing_style`.

    Args:
        panels: The panels; see `build_panels`.
        plot: Title and axes.
        source: The label of published points in the legend.
    """
    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    lines = list(dict.fromkeys(line for panel in panels for line in panel.lines))
    width = max(PANEL_WIDTH * across, NARROWEST_ROW) + LEFT
    handles = _legend_handles(panels, lines, source)
    columns = _legend_columns([str(handle.get_label()) for handle in handles], width)
    slanted = _names_height(panels)
    gap, bottom = GAP + slanted, 0.55 + slanted + 0.22 * math.ceil(len(handles) / columns)
    height = (PANEL_HEIGHT + slanted) * down + TOP + bottom - gap
    figure = new_figure(width, height)
    figure.suptitle(plot.title, fontsize=10, y=1 - 0.12 / height, va="top")
    grid: Any = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    # All sizes are known, and a layout engine would take most of the time.
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - RIGHT / width,
        top=1 - TOP / height,
        bottom=bottom / height,
        wspace=0.08,
        hspace=gap / (PANEL_HEIGHT - GAP),
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, lines, plot)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    _label_axes(grid, panels, plot)
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, borderaxespad=0.2)
    return figure


def _draw_panel(axes: Axes, panel: Panel, lines: Sequence[str], plot: Plot) -> None:
    scale = plot.scale
    axes.set_title(panel.label, fontsize=9)
    axes.set_xscale("linear" if scale == "names" else scale)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not any(point.statistic for points in panel.lines.values() for point in points):
        axes.text(0.5, 0.5, "nothing run", transform=axes.transAxes, ha="center", style="italic")
    for name, points in panel.lines.items():
        place = lines.index(name)
        colour, marker = (styles[place % len(styles)] for styles in (COLOURS, MARKERS))
        shifted = _shifted(axes, _shift_between(len(lines)) * (place - (len(lines) - 1) / 2))
        paper = [(point.x, point.paper) for point in points if point.paper is not None]
        if paper:
            axes.plot(*zip(*paper, strict=True), color=colour, marker=marker, transform=shifted, **HOLLOW)
        # NaN interrupts the line where nothing was measured.
        means = [math.nan if point.statistic is None else point.statistic.mean for point in points]
        # Between names there is nothing that a line could show.
        width = 0.0 if scale == "names" else 1.6
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": width}
        axes.plot([point.x for point in points], means, transform=shifted, **style)
        for point in points:
            if _has_collapsed(point):
                above = (point.x, point.statistic.mean)  # type: ignore[union-attr]
                axes.annotate(MARK, above, (0, 4), textcoords="offset points", color=colour, ha="center")
            # Draw one point at a time, so that a single seed has no bar, not even a flat one.
            if point.statistic is not None and point.statistic.std is not None:
                mean, (low, high) = point.statistic.mean, _bar(point.statistic, plot.metric)
                lengths = [[mean - low], [high - mean]]
                axes.errorbar(
                    point.x, mean, lengths, color=colour, capsize=2.5, linewidth=1, transform=shifted
                )
    # Shifted artists are ignored in the axis limits.
    axes.update_datalim(list(_extent(panel, plot.metric)))
    axes.autoscale_view()


def _bar(statistic: Statistic, metric: str) -> tuple[float, float]:
    """Return the ends of the bar of a mean: one standard deviation from it, but within the range of the metric."""
    mean, spread, found = statistic.mean, statistic.std or 0.0, find_metric(metric)
    low, high = mean - spread, mean + spread
    if found.unit != PERCENT:
        return low, high
    # The mean is inside the bar even if it exceeds 100 by rounding.
    return min(max(low, 0.0), mean), high if found.base in RATIOS else max(min(high, 100.0), mean)


def _is_cut(statistic: Statistic | None, metric: str) -> bool:
    """Return whether the bar of a mean is shorter than one standard deviation on a side."""
    if statistic is None or statistic.std is None:
        return False
    return _bar(statistic, metric) != (statistic.mean - statistic.std, statistic.mean + statistic.std)


def _shift_between(lines: int) -> float:
    return max(LEAST_SHIFT, min(SHIFT, WIDEST_SHIFT / max(1, lines - 1)))


def _extent(panel: Panel, metric: str) -> Iterator[tuple[float, float]]:
    """Yield the extreme points of a panel: published points, means, and the ends of bars."""
    for point in (point for points in panel.lines.values() for point in points):
        if point.paper is not None:
            yield point.x, point.paper
        if point.statistic is not None:
            for end in _bar(point.statistic, metric):
                yield point.x, end


def _shifted(axes: Axes, points: float) -> Transform:
    """Return the data transform shifted to the right by some points."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)


def _label_axes(grid: Any, panels: Sequence[Panel], plot: Plot) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    unit = " (% of training images)" if plot.x == "poison.rate" else ""
    found = find_metric(plot.metric)
    for row in grid:
        row[0].set_ylabel(f"{found.short}{found.suffix} ({found.unit})")
    xs, names = sorted({point.x for point in _points(panels)}), _names(panels)
    for axes in grid.flat:
        if names or _have_room(xs, plot.scale):
            axes.xaxis.set_major_locator(FixedLocator(xs))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, f"{x:g}")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        # Shared axes show labels only in the last row, which may be incomplete.
        axes.tick_params(labelbottom=True, labelsize=TICK_SIZE)
        if names:
            axes.set_xlim(-0.5, len(xs) - 0.5)
            for text in axes.get_xticklabels():
                text.set(rotation=SLANT, rotation_mode="anchor", ha="right", va="center")
    for axes in list(grid.flat)[: len(panels)][-grid.shape[1] :]:
        axes.set_xlabel(f"{axis_name(plot.x)}{unit}")
    if found.unit == PERCENT:
        means = [point.statistic.mean for point in _points(panels) if point.statistic]
        # A ratio of two accuracies can exceed 100%.
        grid.flat[0].set_ylim(-4, max([104, *(mean + 2 for mean in means)]))


def _have_room(xs: Sequence[float], scale: str) -> bool:
    """Whether labels at all measured x fit on the axis; if not, matplotlib chooses them (on a log axis, decades)."""
    places = [math.log(x) for x in xs] if scale == "log" else list(xs)
    gaps = [after - before for before, after in itertools.pairwise(places)]
    return not gaps or min(gaps) / sum(gaps) * PANEL_WIDTH > NARROWEST


def _legend_handles(panels: Sequence[Panel], lines: Sequence[str], source: str) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = []
    for number_, name in enumerate(lines):
        colour, marker = COLOURS[number_ % len(COLOURS)], MARKERS[number_ % len(MARKERS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5}
        handles.append(Line2D([], [], linewidth=0.0 if _names(panels) else 1.6, label=name, **style))
    points = _points(panels)
    if any(point.paper is not None for point in points):
        handles.append(Line2D([], [], color=INK, marker="o", label=f"{source} (hollow)", **HOLLOW))
    return handles


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many legend columns, at least one, fit into a figure of some width in inches."""
    from matplotlib import rcParams
    from matplotlib.textpath import TextPath

    points = max(TextPath((0, 0), text, size=rcParams["font.size"]).get_extents().width for text in labels)
    return max(1, min(LEGEND_COLUMNS, len(labels), int(width / (points / 72 + LEGEND_KEY))))


def _points(panels: Sequence[Panel]) -> list[Point]:
    return [point for panel in panels for points in panel.lines.values() for point in points]


def _has_collapsed(point: Point) -> bool:
    return point.statistic is not None and point.statistic.near_chance > 0


def _x(plot: Plot, point: Point) -> str:
    return point.name or (f"{point.x:g}%" if plot.x == "poison.rate" else f"{point.x:g}")


def _names(panels: Sequence[Panel]) -> dict[float, str]:
    """Return the names on the x axis by their places; empty for numbers."""
    return {point.x: point.name for point in _points(panels) if point.name}


def _names_height(panels: Sequence[Panel]) -> float:
    """Return the height of the slanted names on the x axis, in inches."""
    from matplotlib.textpath import TextPath

    names = _names(panels).values()
    widths = [TextPath((0, 0), name, size=TICK_SIZE).get_extents().width / 72 for name in names]
    return max(widths, default=0.0) * math.sin(math.radians(SLANT))
