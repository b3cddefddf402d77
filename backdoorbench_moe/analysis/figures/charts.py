"""Charts of bars, lines, histograms and matrices, in panels that fit on a phone screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.drawing import COLOURS, INK, MARKERS, PAPER, RULE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Sequence[float | None]
# In inches: the width of a figure, which fits on a phone screen, and the margins around the panels.
WIDTH, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 4.5, 0.62, 0.2, 0.34, 0.46, 0.22
MAX_LABELS, MAX_NUMBERS, LEGEND_COLUMNS = 12, 8, 2
# Largest number of panels in a row, and the height of a panel in such rows, in inches.
MOST_ACROSS, FLAT = 3, 1.2
MAP = "cividis"
# Colours of numbers on coloured squares. Unlike the text of the page, they do not change with the theme.
DARK_TEXT, LIGHT_TEXT = "#111111", "#fafafa"


@dataclass(frozen=True)
class Series:
    """One value for each position on the x axis; a value of None is not drawn.

    Attributes:
        label: Label in the legend.
        values: The values.
        low: Lower ends of their intervals; None without intervals.
        high: Upper ends of their intervals; None without intervals.
        style: "bar", "mark" (a hollow marker, for reference values of bars), "line" or "steps".
    """

    label: str
    values: Values
    low: Values | None = None
    high: Values | None = None
    style: str = "bar"

    @classmethod
    def of(cls, label: str, ones: Sequence[dict[str, Any] | None], factor: float = 1) -> Series:
        """Return bars of the proportions or means in a document, multiplied by a factor."""

        def column(key: str) -> list[float | None]:
            return [None if one is None or one[key] is None else factor * one[key] for one in ones]

        return cls(label, column("value"), column("low"), column("high"))


@dataclass(frozen=True)
class ChartPanel:
    """One panel of a chart: series over the same x axis.

    Attributes:
        title: Title of the panel.
        series: The series.
        names: Labels of the positions on the x axis, for bars.
        x: Positions on the x axis, for lines and steps.
        levels: Heights of horizontal lines, by label.
    """

    title: str
    series: Sequence[Series]
    names: Sequence[str] = ()
    x: Sequence[float] = ()
    levels: dict[str, float] = field(default_factory=dict)


def chart(
    panels: Sequence[ChartPanel],
    *,
    xlabel: str,
    ylabel: str,
    limits: tuple[float | None, float | None] = (0, None),
    height: float = 1.7,
    share_y: bool = True,
) -> Figure:
    """Draw panels in rows.

    Args:
        panels: The panels.
        xlabel: Label of the x axes.
        ylabel: Label of the y axes.
        limits: Limits of the y axes if they are shared; None for an automatic limit.
        height: Height of a panel in inches; smaller if there are many panels.
        share_y: Whether all panels have the same y axis.
    """
    across = _across(len(panels))
    height = height if across < MOST_ACROSS else min(height, FLAT)
    labels = list(dict.fromkeys(one.label for panel in panels for one in panel.series))
    labels += list(dict.fromkeys(name for panel in panels for name in panel.levels))
    legend = LEGEND * math.ceil(len(labels) / LEGEND_COLUMNS) if len(labels) > 1 else 0.05
    figure, grid = _grid(len(panels), across, height, bottom=BOTTOM + legend, share_y=share_y)
    for place, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        axes.set_title(panel.title, fontsize=8.5 if across < MOST_ACROSS else 7.5, loc="left")
        axes.grid(color=RULE, linewidth=0.6, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7.5)
        _draw(axes, panel, labels)
        if place + across >= len(panels):
            axes.set_xlabel(xlabel, fontsize=8)
        if place % across == 0:
            axes.set_ylabel(ylabel, fontsize=8)
    if share_y:
        grid[0].set_ylim(*limits)
    if len(labels) > 1:
        _legend(figure, panels, labels)
    return figure


def matrices(
    panels: Sequence[tuple[str, Sequence[Values]]],
    *,
    xlabel: str,
    ylabel: str,
    limits: tuple[float, float] | None = None,
    form: str = "{:.2f}",
    rows: Sequence[str] | None = None,
) -> Figure:
    """Draw one matrix per panel as coloured squares, with the values as text if they fit.

    Args:
        panels: Titles and matrices; a value of None is not drawn.
        xlabel: Label of the x axes.
        ylabel: Label of the y axes.
        limits: Smallest and largest value of the colour scale; None for the range of the values.
        form: Format of the values.
        rows: Labels of the rows; None to number them.
    """
    across = _across(len(panels))
    values = [value for _, matrix in panels for row in matrix for value in row if value is not None]
    low, high = limits or (min(values, default=0), max(values, default=1))
    lines = max(len(matrix) for _, matrix in panels)
    columns = max(len(row) for _, matrix in panels for row in matrix)
    height = min(4.0, max(1.3, 0.26 * lines + 0.5)) if across < MOST_ACROSS else FLAT
    left = LEFT + (0.075 * max(map(len, rows)) if rows else 0)
    figure, grid = _grid(len(panels), across, height, bottom=BOTTOM, left=left)
    for place, (axes, (title, matrix)) in enumerate(zip(grid, panels, strict=False)):
        shown = [[math.nan if value is None else value for value in row] for row in matrix]
        axes.imshow(shown, cmap=MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=8.5 if across < MOST_ACROSS else 7.5, loc="left")
        axes.tick_params(labelsize=7.5, length=0)
        _number_places(axes.xaxis, len(matrix[0]))
        if rows is None:
            _number_places(axes.yaxis, len(matrix))
        else:
            axes.set_yticks(range(lines), rows if place % across == 0 else [""] * lines)
        if columns * across <= MAX_NUMBERS:
            for y, row in enumerate(matrix):
                for x, value in enumerate(row):
                    if value is not None:
                        light = (value - low) < 0.6 * (high - low)
                        colour = LIGHT_TEXT if light else DARK_TEXT
                        text = form.format(value)
                        axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour)
        if place + across >= len(panels):
            axes.set_xlabel(xlabel, fontsize=8)
        if place % across == 0:
            axes.set_ylabel(ylabel, fontsize=8)
    return figure


def _across(panels: int) -> int:
    return min(panels, 2 if panels <= 4 else MOST_ACROSS)


def _grid(
    panels: int, across: int, height: float, *, bottom: float, left: float = LEFT, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a grid of axes, `across` in a row. All sizes are in inches."""
    down, gap = math.ceil(panels / across), TOP + 0.22
    total = TOP + down * height + (down - 1) * gap + bottom
    figure = new_figure(WIDTH, total)
    grid: Any = figure.subplots(down, across, sharey=share_y, squeeze=False)
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - RIGHT / WIDTH,
        top=1 - TOP / total,
        bottom=bottom / total,
        wspace=0.12 if share_y else 0.22,
        hspace=gap / height,
    )
    for axes in list(grid.flat)[panels:]:
        axes.set_visible(False)
    return figure, list(grid.flat)[:panels]


def _style_of(place: int) -> tuple[str, str]:
    """Return colour and marker of a series. Those of the first len(COLOURS) * len(MARKERS) series differ."""
    rounds, colour = divmod(place, len(COLOURS))
    return COLOURS[colour], MARKERS[(colour + rounds) % len(MARKERS)]


def _draw(axes: Axes, panel: ChartPanel, labels: Sequence[str]) -> None:
    bars = [one for one in panel.series if one.style == "bar"]
    for one in panel.series:
        place = labels.index(one.label)
        colour, marker = _style_of(place)
        values = [math.nan if value is None else value for value in one.values]
        if one.style == "line":
            size = 3 if len(values) <= 30 else 0
            axes.plot(panel.x, values, color=colour, marker=marker, markersize=size, linewidth=1.4)
        elif one.style == "steps":
            axes.stairs(values, panel.x, color=colour, linewidth=1.4, linestyle=("-", "--")[place % 2])
        elif one.style == "mark":
            spots = list(map(float, range(len(values))))
            axes.plot(spots, values, color=INK, marker="D", markersize=5, linestyle="", markerfacecolor=PAPER)
        else:
            width = 0.8 / len(bars)
            spots = [spot - 0.4 + width * (bars.index(one) + 0.5) for spot in range(len(values))]
            axes.bar(spots, values, width=0.92 * width, color=colour, yerr=_bars(one), ecolor=INK, capsize=2)
    for name, level in panel.levels.items():
        colour = COLOURS[labels.index(name) % len(COLOURS)]
        axes.axhline(level, color=colour, linewidth=1.2, linestyle="--")
    if panel.names:
        step = math.ceil(len(panel.names) / MAX_LABELS)
        axes.set_xticks(range(0, len(panel.names), step), panel.names[::step])
    else:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _bars(one: Series) -> list[list[float]] | None:
    """Return the lengths of the error bars below and above the values (0 for no interval); None without intervals."""
    if one.low is None or one.high is None:
        return None
    rows = list(zip(one.values, one.low, one.high, strict=True))
    below = [0.0 if v is None or low is None else max(0.0, v - low) for v, low, _ in rows]
    above = [0.0 if v is None or high is None else max(0.0, high - v) for v, _, high in rows]
    return [below, above]


def _number_places(axis: Any, amount: int) -> None:
    step = math.ceil(amount / MAX_LABELS)
    axis.set_ticks(range(0, amount, step), [str(place) for place in range(0, amount, step)])


def _legend(figure: Figure, panels: Sequence[ChartPanel], labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    styles = {one.label: one.style for panel in panels for one in panel.series}
    handles: list[Any] = []
    for place, name in enumerate(labels):
        colour, marker = _style_of(place)
        match styles.get(name):
            case "bar":
                handles.append(Patch(color=colour, label=name))
            case "mark":
                hollow: dict[str, Any] = {"linestyle": "", "markerfacecolor": PAPER, "markersize": 5}
                handles.append(Line2D([], [], color=INK, marker="D", label=name, **hollow))
            case "line":
                handles.append(Line2D([], [], color=colour, marker=marker, markersize=3, label=name))
            case "steps":
                handles.append(Line2D([], [], color=colour, linestyle=("-", "--")[place % 2], label=name))
            case _:
                handles.append(Line2D([], [], color=colour, linestyle="--", label=name))
    style: dict[str, Any] = {"ncols": LEGEND_COLUMNS, "frameon": False, "fontsize": 7.5, "borderaxespad": 0.1}
    figure.legend(handles=handles, loc="lower center", **style)
