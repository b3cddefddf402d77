"""Writes an audit to a folder: audit.json and report.html."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.auditing import document, report
from backdoorbench_moe.auditing.outcome import Outcome
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import write_atomically

FILES = (document.FILE, report.FILE)


def save_audit(audit: Outcome, output: Path) -> list[Path]:
    """Write the document and the report. Both are built before the first is written, each atomically.

    Returns:
        Paths of the document and of the report.

    Raises:
        RecordError: A file cannot be written.
    """
    values = document.as_document(audit)
    texts = dict(zip(FILES, (document.to_text(values), report.page(values)), strict=True))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"output folder {output}: {error.strerror}") from error
    for name, text in texts.items():
        write_atomically(output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return [output / name for name in texts]
