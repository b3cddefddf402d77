"""What `bbmoe analyze` leaves in a folder: analysis.json, figures/*.png and report.html."""

from __future__ import annotations

import os
from pathlib import Path

from backdoorbench_moe.analysis import document, report
from backdoorbench_moe.analysis.analyze import Analysis
from backdoorbench_moe.errors import RecordError


def save_analysis(analysis: Analysis, output: Path) -> list[Path]:
    """Write the document, the figures and the report into a folder, made if need be; each file whole or not at all.

    Returns the document and the report. All is drawn before anything is written. Raises RecordError.
    """
    values = document.as_document(analysis)
    drawn = report.draw_report(values)
    file = document.save_document(values, output)
    return [file, report.save_report(drawn, output)]


def check_output(output: Path) -> None:
    """Raise RecordError if `output` can be no folder that takes the files; nothing is made."""
    place = output
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise RecordError(f"output folder {output}: expected a folder, {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RecordError(f"output folder {output}: {place} cannot be written to")
    for name in (document.FILE, report.FILE):
        if (output / name).is_dir():
            raise RecordError(f"output folder {output}: expected a file {name}, found a folder")
    if (output / report.FIGURES).exists() and not (output / report.FIGURES).is_dir():
        raise RecordError(f"output folder {output}: expected a folder {report.FIGURES}, found a file")
