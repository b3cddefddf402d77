"""Figures: what they show, that they are the same twice, and that the page takes them as they are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from fake_runs import fill, finished, part_suite, write

from backdoorbench_moe.bench.suites.suite import Plot
from backdoorbench_moe.bench.tables.plots import (
    Panel,
    Point,
    alt_text,
    build_figure,
    build_panels,
    describe,
    draw,
    file_names,
)
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.drawing import drawing_style, inline_svg
from backdoorbench_moe.errors import ConfigError

STATISTIC = Statistic.of({0: 30.0, 1: 90.0})


@pytest.fixture
def results(tmp_path) -> ResultSet:
    suite = part_suite()
    fill(suite, tmp_path)
    return ResultSet.from_runs(suite, tmp_path)


def test_panels_lines_and_points_in_percent(results) -> None:
    panels = build_panels(results, results.suite.plots[0])
    assert [panel.label for panel in panels] == ["square", "warp"]
    assert list(panels[0].lines) == ["image", "patch"]
    square = panels[0].lines["image"]
    assert [(point.x, point.paper) for point in square] == [(0.5, 90.7), (10, 99.1)]
    # Seeds 0 and 1 of cell 0: 0 and 300 of 9,000.
    assert square[0].statistic is not None
    assert square[0].statistic.mean == pytest.approx(100 * 150 / 9000)
    # The last cell was not run; the paper's point stands all the same.
    assert [(point.statistic is None, point.paper) for point in panels[1].lines["patch"]][1] == (True, 99.8)


def test_two_cells_at_one_point_and_an_axis_that_cannot_be_are_refused(tmp_path) -> None:
    grid = {"applicator": "image", "trigger": [{"name": "square", "size": n} for n in (2, 4)]}
    results = ResultSet.from_runs(part_suite(grid=grid, tables=[]), tmp_path)
    with pytest.raises(ConfigError, match=r"plot 'p': .*would share its point"):
        build_panels(results, Plot("p"))
    with pytest.raises(
        ConfigError, match=r"trigger\.name: expected positive numbers.*'square'; for names, use scale: names"
    ):
        build_panels(results, Plot("p", x="trigger.name"))


@pytest.mark.parametrize(("mean", "top"), [(90.0, 104), (130.0, 132)])
def test_a_ratio_above_100_is_not_cut_off(mean, top) -> None:
    panel = Panel("p", {"l": [Point(1.0, Statistic.of({0: mean}), None)]})
    plot = Plot("p", metric="overall")
    with drawing_style("p"):
        assert build_figure([panel], plot, "paper").axes[0].get_ylim() == (-4, top)


@pytest.mark.parametrize(
    ("metric", "values", "ends"),
    [
        ("asr", (0.0, 8.0), (0.0, 4 + 32**0.5)),
        ("ba", (100.0, 90.0), (95 - 50**0.5, 100.0)),
        ("asr", (100 + 1e-13, 100 + 1e-13), (100.0, 100.0)),
        ("overall", (90.0, 110.0), (100 - 200**0.5, 100 + 200**0.5)),
        ("cad", (0.0, 8.0), (4 - 32**0.5, 4 + 32**0.5)),
    ],
)
def test_bars_end_where_the_metric_does(metric, values, ends) -> None:
    panel = Panel("p", {"l": [Point(1.0, Statistic.of(dict(enumerate(values))), None)]})
    with drawing_style("p"):
        [bars] = build_figure([panel], Plot("p", metric=metric), "paper").axes[0].collections
    [[(_, low), (_, high)]] = bars.get_segments()
    assert (low, high) == pytest.approx(ends)


def test_markers_of_two_lines_at_one_place_do_not_overlap() -> None:
    points = [Point(1.0, Statistic.of({0: 50.0}), None)]
    with drawing_style("p"):
        figure = build_figure([Panel("p", {"a": points, "b": points})], Plot("p"), "paper")
        first, second = (
            line.get_transform().transform((1.0, 50.0))[0]
            for line in figure.axes[0].lines
            if line.get_markersize() == 4.5
        )
        assert (second - first) / figure.dpi * 72 > 4.5


@pytest.mark.parametrize("form", ["svg", "png"])
def test_the_same_bytes_twice(results, form) -> None:
    plot = results.suite.plots[0]
    assert draw(results, plot, form) == draw(results, plot, form)


def test_nothing_of_the_users_settings_nor_of_today_is_drawn(results) -> None:
    import matplotlib

    plot = results.suite.plots[0]
    svg = draw(results, plot, "svg")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert draw(results, plot, "svg") == svg
    assert matplotlib.rcParams["svg.hashsalt"] is None
    assert b"<dc:date>" not in svg


def test_names_have_equal_distances_in_the_order_of_the_cells(results) -> None:
    plot = Plot("p", x="trigger.name", panels="poison.rate", scale="names")
    panels = build_panels(results, plot)
    assert [panel.label for panel in panels] == ["0.5%", "10%"]
    image = panels[0].lines["image"]
    assert [(point.x, point.name) for point in image] == [(0, "square"), (1, "warp")]
    assert "0.5%, image: 1.7 at square" in alt_text(results, plot)
    with drawing_style("p"):
        figure = build_figure([*panels, *panels], plot, "paper")
        figure.draw_without_rendering()
        upper, below = figure.axes[0], figure.axes[3]
        assert [text.get_text() for text in below.get_xticklabels()] == ["square", "warp"]
        means = [line for line in upper.lines if line.get_markersize() == 4.5]
        assert means and all(line.get_linewidth() == 0 for line in means)
        # All names are inside the figure, and those of the upper row above the titles of the lower one.
        boxes = [text.get_window_extent() for axes in (upper, below) for text in axes.get_xticklabels()]
        assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
        assert min(box.y0 for box in boxes[:2]) > below.title.get_window_extent().y1


def test_bars_stand_only_where_there_are_seeds(tmp_path) -> None:
    suite = part_suite()
    write(tmp_path, finished(suite.cells[0].spec))
    single = ResultSet.from_runs(suite, tmp_path)
    plot = suite.plots[0]
    assert describe(single, plot).endswith(
        "; single seeds, therefore without bars; hollow markers are the paper's."
    )
    bars = len(re.findall(r'id="LineCollection_', draw(single, plot, "svg").decode()))
    assert bars == 0
    fill(suite, tmp_path)
    several = ResultSet.from_runs(suite, tmp_path)
    assert "one standard deviation over seeds" in describe(several, plot)
    assert len(re.findall(r'id="LineCollection_', draw(several, plot, "svg").decode())) == 7


def test_alt_text_says_the_ends_of_each_line(results) -> None:
    text = alt_text(results, results.suite.plots[0])
    assert text.startswith("Attack success rate (ASR), %. square, image: 1.7 at 0.5% to 12.8 at 10%;")


def test_labels_are_text_whatever_they_hold(tmp_path) -> None:
    """No formula, no element, no script; and in the page no id of another figure."""
    title = '$x_1$ </svg><script>alert(1)</script> & "quotes"'
    suite = part_suite(plots=[{"title": title}])
    results = ResultSet.from_runs(suite, tmp_path)
    svg = draw(results, suite.plots[0], "svg")
    assert b"<script" not in svg
    text = inline_svg(svg, "p1", alt=title)
    assert "<script" not in text
    tree = ElementTree.fromstring(text)
    assert tree.attrib["aria-label"] == title
    assert title in "".join(tree.itertext())
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert ids
    assert all(name.startswith("p1-") for name in ids)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]*)', text))
    assert used
    assert used <= set(ids)


def test_file_names_are_plain_and_each_its_own() -> None:
    titles = ["CIFAR-10: ASR", "GTSRB", "cifar 10 / asr", "CIFAR 10 ASR 2", "%%"]
    assert file_names([Plot(title) for title in titles]) == [
        "cifar-10-asr",
        "gtsrb",
        "cifar-10-asr-2",
        "cifar-10-asr-2-2",
        "plot",
    ]


@pytest.mark.parametrize("panels", [1, 3])
@pytest.mark.parametrize("words", [1, 3, 12])
def test_the_legend_is_inside_the_figure_however_long_its_labels_are(words, panels) -> None:
    lines = {f"{'word ' * words}{number}": [Point(1.0, None, 50.0)] for number in range(5)}
    drawn = [Panel(f"panel {number}", lines) for number in range(panels)]
    with drawing_style("salt"):
        figure = build_figure(drawn, Plot("p"), "paper")
        box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert 0 <= box.y0 < box.y1 < figure.axes[0].bbox.y0


@pytest.mark.parametrize("metric", ["asr", "seconds"])
@pytest.mark.parametrize("scale", ["log", "linear"])
def test_everything_is_inside_the_axes(metric, scale) -> None:
    lines = {f"line {number}": [Point(x, STATISTIC, 250.0 * x) for x in (0.1, 0.4)] for number in range(3)}
    with drawing_style("salt"):
        figure = build_figure([Panel("panel", lines)], Plot("p", metric=metric, scale=scale), "paper")
        figure.draw_without_rendering()
        [axes] = figure.axes
        drawn = [line for line in axes.lines if len(line.get_xdata())]
        places = [line.get_transform().transform(line.get_xydata()) for line in drawn]
    # Of each line the means and the published points, and of each bar its middle and two caps.
    assert len(drawn) == 3 * (2 + 2 * 3)
    assert all(axes.bbox.x0 <= x <= axes.bbox.x1 for place in places for x, _ in place)
    assert all(axes.bbox.y0 <= y <= axes.bbox.y1 for place in places for _, y in place)
