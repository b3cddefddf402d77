"""`report.html`: an analysis as one page that needs nothing else, and its figures as files, from its document."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from backdoorbench_moe.analysis.figures.backdoor import draw_backdoor
from backdoorbench_moe.analysis.figures.maps import draw_maps
from backdoorbench_moe.analysis.figures.pixels import draw_pixels
from backdoorbench_moe.analysis.figures.plate import Doc, Plate
from backdoorbench_moe.analysis.figures.routing import draw_routing
from backdoorbench_moe.analysis.figures.training import draw_training
from backdoorbench_moe.analysis.figures.words import role
from backdoorbench_moe.analysis.report_tables import (
    expert_tables,
    finding_lines,
    flat,
    metric_rows,
    stage_table,
)
from backdoorbench_moe.drawing import inline_svg, render_page
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import write_atomically

FILE, FIGURES = "report.html", "figures"
# In CSS pixels for an inch: a figure is never so small that its letters are, nor needlessly large.
LEAST, MOST = 72, 118
# A figure of more inches takes the whole width of the page.
COLUMN = 5.5


@dataclass(frozen=True)
class Section:
    """A part of the page. note: what it is about, or why it is empty."""

    name: str
    title: str
    note: str
    plates: tuple[Plate, ...]


def draw_sections(document: Doc) -> list[Section]:
    """All figures, by the part of the page they stand in."""
    parts: list[tuple[str, str, Callable[[Doc], Iterator[Plate]]]] = [
        ("training", "Training", draw_training),
        ("examples", "Single images", draw_maps),
        ("routing", "Routing of the whole test set", draw_routing),
        ("backdoor", "What the trigger does, and who carries the backdoor", draw_backdoor),
        ("pixels", "Pixel value and routing", draw_pixels),
    ]
    return [Section(name, title, NOTES.get(name, ""), tuple(draw(document))) for name, title, draw in parts]


NOTES = {
    "examples": "Drawn by the run's seed, one of each class in turn, or as --images says.",
    "backdoor": "Measured on the test images that count for ASR: those that are not of the wanted class already.",
    "pixels": "A patch's sum is over its pixels, of their mean over the channels, in [0, 1].",
}


@dataclass(frozen=True)
class Report:
    """A drawn report: the page, and the figures by file name without suffix."""

    page: str
    figures: dict[str, bytes]


def draw_report(document: Doc) -> Report:
    """The report of an analysis' document; the same document, the same bytes."""
    return make_report(document, draw_sections(document))


def make_report(document: Doc, sections: list[Section]) -> Report:
    """The report of a document whose figures are drawn."""
    figures = {plate.name: plate.png for section in sections for plate in section.plates}
    return Report(page(document, sections), figures)


def save_report(report: Report, output: Path) -> Path:
    """Write report.html and figures/*.png into a folder that is there; each file whole or not at all.

    Figures of an earlier analysis that are not drawn any more are removed. Raises RecordError.
    """
    folder = output / FIGURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"output folder {folder}: {error.strerror}") from error
    for name, png in report.figures.items():
        write_atomically(folder / f"{name}.png", partial(_put, png))
    for file in folder.glob("*.png"):
        if file.stem not in report.figures:
            file.unlink()
    write_atomically(output / FILE, lambda path: path.write_text(report.page, encoding="utf-8"))
    return output / FILE


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def page(document: Doc, sections: list[Section]) -> str:
    """The page as HTML; nothing on it is loaded from elsewhere, and names are text, whatever is in them."""
    template = (files("backdoorbench_moe.analysis") / "templates" / "report.html").read_text(encoding="utf-8")
    run, against = document["run"], document["against"]
    return render_page(
        template,
        run=run,
        against=against,
        role=role(run),
        backdoored=run["record"]["spec"]["trigger"] is not None,
        defenses=[part["name"] for part in run["record"]["spec"].get("defenses", [])],
        counts=document["images"],
        trigger_from=document["trigger_from"],
        findings=finding_lines(document),
        metrics=metric_rows(document),
        stages=stage_table(run),
        tables=expert_tables(document),
        sections=[_section(section) for section in sections if section.plates],
        absent=document["absent"],
        settings=flat(run["record"]["spec"]),
        environment=flat(_environment(run)),
        seconds=document["seconds"]["total"],
        command=command(document),
    )


def command(document: Doc) -> str:
    """What makes this analysis again, from the folder of run folders."""
    words = ["bbmoe", "analyze", document["run"]["name"]]
    if document["against"] is not None:
        words += ["--against", document["against"]["name"]]
    return shlex.join(words)


def _section(section: Section) -> dict[str, Any]:
    from markupsafe import Markup

    figures = []
    for plate in section.plates:
        sizes = f"min-width: {LEAST * plate.width:.0f}px; max-width: {MOST * plate.width:.0f}px"
        # Drawn by us from numbers and escaped labels, not a user's text.
        svg = Markup(inline_svg(plate.svg, plate.name, plate.alt, style=sizes))
        wide = plate.width > COLUMN
        figures.append({**vars(plate), "svg": svg, "wide": wide})
    return {"name": section.name, "title": section.title, "note": section.note, "figures": figures}


def _environment(run: Doc) -> Doc:
    record = run["record"]
    names = ("environment", "timing", "seeds", "data", "poison", "parts", "parent", "clean_twin")
    known = {name: record[name] for name in names if record[name]}
    return {**known, "digest": run["digest"]}
