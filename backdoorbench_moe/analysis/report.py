"""`report.html` and figures/*.png: an analysis as a self-contained page, drawn from its JSON document."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from backdoorbench_moe.analysis.figures.backdoor import draw_backdoor
from backdoorbench_moe.analysis.figures.maps import draw_maps
from backdoorbench_moe.analysis.figures.mixture import draw_experts
from backdoorbench_moe.analysis.figures.pixels import draw_pixels
from backdoorbench_moe.analysis.figures.plate import Doc, Plate
from backdoorbench_moe.analysis.figures.routing import draw_routing
from backdoorbench_moe.analysis.figures.training import draw_training
from backdoorbench_moe.analysis.figures.words import is_text, role
from backdoorbench_moe.analysis.report_tables import (
    answer_tables,
    expert_tables,
    finding_lines,
    flat,
    metric_rows,
    mixture_tables,
    stage_table,
)
from backdoorbench_moe.analysis.results import DEFAULT_CARRIERS_IMAGES
from backdoorbench_moe.collapse import MARK, MARK_LEGEND
from backdoorbench_moe.drawing import inline_svg, render_page
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import write_atomically

FILE, FIGURES, LIST = "report.html", "figures", ".written.json"
# Smallest and largest scale of a figure, in CSS pixels per inch: its text stays legible and it does not get too large.
MIN_SCALE, MAX_SCALE = 72, 118
# A figure wider than this, in inches, spans both columns of the page.
COLUMN = 5.5


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: Its id on the page.
        title: Its heading.
        note: A sentence below the heading; may be empty.
        plates: Its figures. A section without figures and tables is left out.
    """

    name: str
    title: str
    note: str
    plates: tuple[Plate, ...]


def draw_sections(document: Doc) -> list[Section]:
    """Draw all figures of a document, section by section."""
    parts: list[tuple[str, str, Callable[[Doc], Iterator[Plate]]]] = [
        ("training", "Training", draw_training),
        ("examples", "Single images", draw_maps),
        ("experts", "The experts of the mixture", draw_experts),
        ("answers", "Example answers", _no_plates),
        ("routing", "Routing of the whole test set", draw_routing),
        ("backdoor", "What the trigger does, and who carries the backdoor", draw_backdoor),
        ("pixels", "Pixel value and routing", draw_pixels),
    ]
    notes = NOTES | (TEXT_NOTES if is_text(document) else {})
    return [Section(name, title, notes.get(name, ""), tuple(draw(document))) for name, title, draw in parts]


def _no_plates(_: Doc) -> Iterator[Plate]:
    """Draw nothing, for a section that has tables only."""
    return iter(())


NOTES = {
    "examples": "Drawn with the run's seed, one of each class in turn, or chosen with --images.",
    "experts": "The gate share of an expert is the weight of its output in a layer, mean over patches and images.",
    "backdoor": "Measured on the test images that count for ASR: those that do not belong to the wanted class already.",
    "pixels": "A patch sum adds up the pixels of a patch; each is averaged over the channels and lies in [0, 1].",
}

TEXT_NOTES = {
    "experts": "The gate share of an expert is the weight of its output in a layer, mean over texts and the positions "
    "that emit the answer; of harmful queries, over those that emit the first tokens of the harmful answer. A patched "
    "expert adds to every token what it adds to one of clean texts on average, since no harmful query has a clean "
    "version.",
    "answers": "Test queries, drawn with the run's seed. Of harmful queries the safe answer is expected.",
}


@dataclass(frozen=True)
class AnalysisReport:
    """A drawn report.

    Attributes:
        page: The HTML page.
        figures: PNG files by their names without suffix.
    """

    page: str
    figures: dict[str, bytes]


def draw_report(document: Doc) -> AnalysisReport:
    """Draw the report of an analysis. Equal documents give equal bytes."""
    return make_report(document, draw_sections(document))


def make_report(document: Doc, sections: list[Section]) -> AnalysisReport:
    """Make a report of sections that are already drawn."""
    figures = {plate.name: plate.png for section in sections for plate in section.plates}
    return AnalysisReport(page(document, sections), figures)


def save_report(report: AnalysisReport, output: Path) -> Path:
    """Write report.html and figures/*.png, each file atomically.

    Figures that an earlier analysis wrote, and that are not part of the report, are deleted.

    Args:
        report: The report.
        output: The folder to write to, which exists.

    Returns:
        Path of report.html.

    Raises:
        RecordError: A file cannot be written.
    """
    folder = output / FIGURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"output folder {folder}: {error.strerror}") from error
    for name, png in report.figures.items():
        write_atomically(folder / f"{name}.png", partial(_write_bytes, png))
    for name in _listed(folder) - report.figures.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    names = json.dumps(sorted(report.figures))
    write_atomically(folder / LIST, lambda path: path.write_text(names, encoding="utf-8"))
    write_atomically(output / FILE, lambda path: path.write_text(report.page, encoding="utf-8"))
    return output / FILE


def _listed(folder: Path) -> set[str]:
    """The figures that an earlier analysis wrote to a folder: only these are deleted, whatever else lies there."""
    try:
        names = json.loads((folder / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return {name for name in texts if Path(name).name == name}


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def page(document: Doc, sections: list[Section]) -> str:
    """Render the page as HTML.

    The page loads nothing from elsewhere, and names from the document are escaped.
    """
    tables = {
        "routing": expert_tables(document),
        "experts": mixture_tables(document),
        "answers": answer_tables(document),
    }
    template = (files("backdoorbench_moe.analysis") / "templates" / "report.html").read_text(encoding="utf-8")
    run, against, metrics = document["run"], document["against"], metric_rows(document)
    return render_page(
        template,
        run=run,
        against=against,
        role=role(run),
        backdoored=run["attacked"],
        imported=run["attacked"] is None,
        unknown_start=run["record"]["parts"].get("model", {}).get("start", {}).get("backdoored") == "unknown",
        defenses=[part["name"] for part in run["record"]["spec"].get("defenses", [])],
        counts=document["images"],
        trigger_from=document["trigger_from"],
        findings=finding_lines(document),
        metrics=metrics,
        metrics_note=MARK_LEGEND if any(MARK in cell for row in metrics for cell in row) else "",
        stages=stage_table(run),
        tables=tables,
        sections=[_section(each) for each in sections if each.plates or tables.get(each.name)],
        text=is_text(document),
        absent=document["absent"],
        settings=flat(run["record"]["spec"]),
        environment=flat(_environment(run)),
        seconds=document["seconds"]["total"],
        command=command(document),
    )


def command(document: Doc) -> str:
    """Return the command that repeats the analysis.

    It is to be run in the folder of the run folders; image files that were given are to be copied there.
    """
    words = ["bbmoe", "analyze", document["run"]["name"]]
    if document["against"] is not None:
        words += ["--against", document["against"]["name"]]
    options = document.get("options", {})  # Older documents do not have them.
    if (images := options.get("images")) is not None:
        words += ["--images", ",".join(map(str, images))]
    if (count := options.get("carriers_images", DEFAULT_CARRIERS_IMAGES)) != DEFAULT_CARRIERS_IMAGES:
        words += ["--carriers-images", str(count)]
    return shlex.join(words)


def _section(section: Section) -> dict[str, Any]:
    from markupsafe import Markup

    figures = []
    for plate in section.plates:
        sizes = f"min-width: {MIN_SCALE * plate.width:.0f}px; max-width: {MAX_SCALE * plate.width:.0f}px"
        # Safe as markup: matplotlib escapes the labels in the SVG.
        svg = Markup(inline_svg(plate.svg, plate.name, plate.alt, style=sizes))
        wide = plate.width > COLUMN
        figures.append({**vars(plate), "svg": svg, "wide": wide})
    return {"name": section.name, "title": section.title, "note": section.note, "figures": figures}


def _environment(run: Doc) -> Doc:
    record = run["record"]
    names = ("environment", "timing", "seeds", "data", "poison", "parts", "parent", "clean_twin")
    known = {name: record[name] for name in names if record[name]}
    return {**known, "digest": run["digest"]}
