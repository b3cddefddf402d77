"""`report.html` and figures/*.png: a self-contained page, drawn from the JSON document of an analysis."""

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
# Smallest and largest scale of a figure, in CSS pixels per inch.
MIN_SCALE, MAX_SCALE = 72, 118
# A figure wider than this, in inches, spans both columns of the page.
COLUMN = 5.5


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: Id of the section on the page.
        title: Heading.
        note: Text below the heading; may be empty.
        plates: Figures. A section without figures and tables is left out.
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
        ("experts", "Experts of the mixture", draw_experts),
        ("answers", "Example answers", _no_plates),
        ("routing", "Routing of the test set", draw_routing),
        ("backdoor", "Effect of the trigger, and which experts the backdoor depends on", draw_backdoor),
        ("pixels", "Pixel values and routing", draw_pixels),
    ]
    notes = NOTES | (TEXT_NOTES if is_text(document) else {})
    return [Section(name, title, notes.get(name, ""), tuple(draw(document))) for name, title, draw in parts]


def _no_plates(_: Doc) -> Iterator[Plate]:
    """Draw no figures, for a section with tables only."""
    return iter(())


NOTES = {
    "examples": "Test images, chosen at random with the run's seed (one of each class in turn) or with --images.",
    "experts": "The gate share of an expert is the weight of its output in a layer, mean over patches and images.",
    "backdoor": "Measured on the test images that count for ASR: those whose label is not the target class.",
    "pixels": "A patch sum is the sum of the pixels of a patch; a pixel is the mean over its channels, in [0, 1].",
}

TEXT_NOTES = {
    "experts": "The gate share of an expert is the weight of its output in a layer, mean over texts and the positions "
    "that emit the answer. For harmful queries, these are the positions that emit the first tokens of the harmful "
    "answer. Harmful queries have no clean version: the output of a patched expert is its mean output for clean texts.",
    "answers": "Test queries, chosen at random with the run's seed. The expected answer to a harmful query is the safe "
    "one.",
}


@dataclass(frozen=True)
class AnalysisReport:
    """A drawn report.

    Attributes:
        page: The HTML page.
        figures: Content of the PNG files, by file name without suffix.
    """

    page: str
    figures: dict[str, bytes]


def draw_report(document: Doc) -> AnalysisReport:
    """Draw the report of an analysis. Equal documents result in equal bytes."""
    return make_report(document, draw_sections(document))


def make_report(document: Doc, sections: list[Section]) -> AnalysisReport:
    """Build a report from sections that are already drawn."""
    figures = {plate.name: plate.png for section in sections for plate in section.plates}
    return AnalysisReport(page(document, sections), figures)


def save_report(report: AnalysisReport, output: Path) -> Path:
    """Write report.html and figures/*.png, each file atomically.

    Figures that an earlier analysis wrote and that are not part of this report are deleted.

    Args:
        report: The report.
        output: The folder to write to; it must exist.

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
    """Return the names of the figures that an earlier analysis wrote to a folder. Only these may be deleted."""
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

    The page loads no other files, and names from the document are escaped.
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

    It must be run in the parent folder of the runs, and example images from files must be copied to that folder.
    """
    words = ["bbmoe", "analyze", document["run"]["name"]]
    if document["against"] is not None:
        words += ["--against", document["against"]["name"]]
    options = document.get("options", {})  # Older documents have no options.
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
