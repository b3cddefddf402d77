"""What reports and figures say and show: no number without its value, no wrong plural, no label outside."""

from __future__ import annotations

import ast
import copy
import functools
import re
from pathlib import Path

import pytest
from matplotlib.axis import Tick
from matplotlib.text import Text
from report_runs import SPECS, analysis_of, document_of

import backdoorbench_moe
from backdoorbench_moe.analysis.figures import plate
from backdoorbench_moe.analysis.figures.pixels import verdict
from backdoorbench_moe.analysis.report import Section, draw_sections
from backdoorbench_moe.analysis.report_tables import finding_lines
from backdoorbench_moe.cli.tables.analysis import experts_table, layer_lines
from backdoorbench_moe.wording.counting import count

# Each report is drawn once for all of them: in the same process under xdist (--dist loadgroup).
pytestmark = pytest.mark.xdist_group("wording")

SOURCE = Path(backdoorbench_moe.__file__).parent
# A value that is not there, in the middle of a sentence.
HOLE = re.compile(r"(?<![\w.])(–|nan|None|inf)(?![\w–])")
ONE_OF_MANY = re.compile(
    r"(?<![\d.,])1 (images|patches|epochs|experts|layers|runs|classes|files|probe images)\b"
)


@functools.cache
def drawn(kind: str) -> tuple[list[Section], dict[str, list[str]]]:
    """The sections of the report of an analysis, and the texts outside of its figures, by figure."""
    cut: dict[str, list[str]] = {}
    make_plate = plate.make_plate

    def check(name, title, sentence, alt, make):
        def make_and_look():
            figure = make()
            if texts := outside(figure):
                cut[name] = texts
            return figure

        return make_plate(name, title, sentence, alt, make_and_look)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("backdoor", "maps", "pixels", "routing", "training"):
            patch.setattr(f"backdoorbench_moe.analysis.figures.{module}.make_plate", check)
        return draw_sections(document_of(kind)), cut


@functools.cache
def sentences(kind: str) -> list[str]:
    """Everything that the report and the terminal say of an analysis in words."""
    document, analysis = document_of(kind), analysis_of(kind)
    sections, _ = drawn(kind)
    said = [text for s in sections for p in s.plates for text in (p.title, p.sentence, p.alt)]
    said += finding_lines(document)
    layers = range(len(analysis.findings.routing or ()))
    return said + [line for layer in layers for line in layer_lines(analysis, layer)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECS)
def test_no_sentence_has_a_hole_where_a_number_belongs(kind) -> None:
    for text in sentences(kind):
        assert not HOLE.search(text), text
        assert "  " not in text and not re.search(r"(?<! in)[\s(]%|\(\)|\[,|, ,", text), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECS)
def test_one_thing_is_in_the_singular(kind) -> None:
    for text in sentences(kind):
        assert not ONE_OF_MANY.search(text) and "epoches" not in text, text


@pytest.mark.slow
def test_a_table_has_no_nan() -> None:
    table = experts_table(analysis_of("one expert"), 0)
    cells = [cell for column in table.columns for cell in column._cells]
    assert "–" in cells and not any("nan" in str(cell) for cell in cells)


PLURALS = {
    "patch": "patches", "epoch": "epochs", "image": "images", "probe image": "probe images", "class": "classes",
    "run": "runs", "finished run": "finished runs", "expert": "experts", "clean probe image": "clean probe images",
    "box": "boxes", "cell": "cells",
    "deviation": "deviations", "test image": "test images", "defense": "defenses", "row": "rows",
    "other key": "other keys", "tensor": "tensors", "selection": "selections", "kind": "kinds",
}  # fmt: skip


@pytest.mark.parametrize(("one", "many"), PLURALS.items())
def test_plurals(one, many) -> None:
    assert [count(0, one), count(1, one), count(2, one)] == [f"0 {many}", f"1 {one}", f"2 {many}"]
    assert count(12345, one) == f"12,345 {many}"


def test_every_word_that_is_counted_has_its_plural_checked() -> None:
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "count"
            if named and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
                found.add(node.args[1].value)
    assert found and found <= PLURALS.keys()


def outside(figure) -> list[str]:
    """Texts of a figure that reach over its edge by more than half a point."""
    figure.canvas.draw()
    renderer, box, slack = figure.canvas.get_renderer(), figure.bbox, figure.dpi / 144
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            drawn = set(map(id, axis._update_ticks()))
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            for tick in [tick for tick in ticks if id(tick) not in drawn or not axes.axison]:
                assert isinstance(tick, Tick)
                hidden |= {id(tick.label1), id(tick.label2)}
        if not axes.get_visible():
            hidden |= {id(text) for text in axes.findobj(Text)}
    found = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden:
            extent = text.get_window_extent(renderer)
            inside = extent.x0 >= -slack and extent.y0 >= -slack
            if not (inside and extent.x1 <= box.width + slack and extent.y1 <= box.height + slack):
                found.append(text.get_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECS)
def test_no_label_is_cut_off_at_the_edge_of_a_figure(kind) -> None:
    assert drawn(kind)[1] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model", "named"),
    [
        ("cifar10", "pmoe", True),
        ("gtsrb", "pmoe", True),
        ("folder", "pmoe", False),
        ("cifar10", "vmoe", False),
    ],
)
def test_the_paper_is_only_named_where_the_run_is_on_its_data_and_model(data, model, named) -> None:
    document = copy.deepcopy(document_of("pmoe"))
    document["run"] |= {"data": data, "model": model}
    said = [verdict(document), *finding_lines(document)]
    assert any("BadPatches" in text for text in said) == named
    assert not any(re.search(r"\bthe paper\b", text) for text in said)


@pytest.mark.slow
def test_no_p_value_is_said_of_patches() -> None:
    """The patches of an image are not independent."""
    for kind in SPECS:
        assert not any(re.search(r"\bp ?(below|[=<\d])|p-value", text) for text in sentences(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("single", "expected"),
    [
        (
            40.0,
            "Muting moe/1 reduces the model's ASR from 90.0% [0.0, 100.0] to 40.0% [0.0, 100.0]; "
            "muting any other single expert does not reduce it further.",
        ),
        (90.0, "Muting a single expert does not reduce the model's ASR of 90.0% [0.0, 100.0]."),
    ],
)
def test_the_expert_whose_muting_reduces_asr_most_is_named_only_if_one_does(single, expected) -> None:
    document = copy.deepcopy(document_of("one expert"))
    row = {"n": 100, "low": 0.0, "high": 100.0}
    document["carriers"] = {
        "whole": {"asr": {"value": 90.0, **row}},
        "singles": [
            {"experts": ["moe/0"], "asr": {"value": 95.0, **row}},
            {"experts": ["moe/1"], "asr": {"value": single, **row}},
        ],
    }
    assert expected in finding_lines(document)


def rate(value: float) -> dict[str, float]:
    return {"value": value, "n": 100, "low": 0.0, "high": 100.0}


@pytest.mark.parametrize(
    ("cad", "drop"), [(1.25, "1.25 percentage points below"), (-0.5, "0.50 percentage points above")]
)
def test_findings_of_a_document_by_hand(cad, drop) -> None:
    """The layer that is named is the one whose capture is farthest from blind routing, to whichever side."""
    metrics = {"ba": rate(95), "asr": rate(90), "target_rate": rate(2), "cad": {"value": cad}}
    run = {
        "metrics": metrics,
        "attacked": True,
        "record": {"spec": {}, "data": {"name": "tiny"}, "near_chance": False},
    }
    capture = [
        {"layer": "a", "captured": rate(60), "blind_captured": 40.0},
        {"layer": "b", "captured": rate(10), "blind_captured": 70.0},
    ]
    shift = [{"changed": {"value": value, "low": None, "high": None}} for value in (0.1, 0.25)]
    document = {
        "run": run,
        "against": None,
        "capture": capture,
        "shift": shift,
        "carriers": None,
        "pixels": None,
    }
    assert finding_lines(document) == [
        "The backdoored model has BA 95.00% and ASR 90.00%; without the trigger it already predicts the target class "
        f"for 2.00% of the same images; its clean accuracy is {drop} that of the clean twin.",
        "In layer b, at least one expert receives a patch that the trigger changed in 10.0% of the triggered images, "
        "compared with 70.0% under blind routing; the trigger replaces 25% of the selected patches.",
    ]
