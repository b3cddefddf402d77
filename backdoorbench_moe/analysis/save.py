"""Writes an analysis to a folder: analysis.json, figures/*.png and report.html."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe import paths
from backdoorbench_moe.analysis import document, report
from backdoorbench_moe.analysis.results import Analysis
from backdoorbench_moe.errors import RecordError


def save_analysis(analysis: Analysis, output: Path) -> list[Path]:
    """Write the document, the figures and the report of an analysis.

    Everything is drawn before the first file is written, and each file is written atomically.

    Args:
        analysis: The analysis.
        output: The folder to write to; it is created if it does not exist.

    Returns:
        Paths of the document and of the report.

    Raises:
        RecordError: A file cannot be written.
    """
    values = document.as_document(analysis)
    drawn = report.draw_report(values)
    file = document.save_document(values, output)
    return [file, report.save_report(drawn, output)]


def check_output(output: Path) -> None:
    """Check, without creating anything, that the files of an analysis can be written to a folder.

    Raises:
        ConfigError: The path is a file.
        RecordError: The folder or a file cannot be written.
    """
    paths.check_output(output, "output", (document.FILE, report.FILE))
    if (output / report.FIGURES).exists() and not (output / report.FIGURES).is_dir():
        raise RecordError(f"output: {output}: expected a folder {report.FIGURES}, found a file")
