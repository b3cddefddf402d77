"""The folder that an audit is written to: one audit does not overwrite that of another model or of other images."""

from __future__ import annotations

import os
from pathlib import Path

from backdoorbench_moe.auditing import document, report
from backdoorbench_moe.auditing.store import CHECKS, read_values
from backdoorbench_moe.errors import ConfigError, RecordError

FOLDER = "audit"
# So many characters of a subject's digest tell the folders of a run's audits apart.
SHOWN = 8


def place_in_run(run: Path, digest: str) -> Path:
    """Return the folder of an audit in a run folder.

    It is `audit`; or, where that has the audit of another subject, such as one with other images, `audit-DIGEST`.

    Args:
        run: The run folder.
        digest: Identifies the subject, see `audit.digest_of`.
    """
    usual = run / FOLDER
    return run / f"{FOLDER}-{digest[:SHOWN]}" if has_others(usual, digest) else usual


def check_place(folder: Path, digest: str, parameter: str) -> None:
    """Check that a folder that a user named has no audit of another subject.

    Args:
        folder: The folder; it need not exist.
        digest: Identifies the subject.
        parameter: What the folder was given by, for the message.

    Raises:
        ConfigError: It has one.
    """
    if has_others(folder, digest):
        raise ConfigError.expected(
            parameter,
            "a folder without the audit of another model, or of this one with other images, base or device; "
            "choose another folder or remove this one",
            str(folder),
        )


def has_others(folder: Path, digest: str) -> bool:
    """Return whether a folder has results of other subjects, and none of this one."""
    read = [read_values(file) for file in sorted((folder / CHECKS).glob("*.json"))]
    subjects = {str(values["subject"]) for values in read if values is not None and "subject" in values}
    return bool(subjects) and digest not in subjects


def check_output(folder: Path, parameter: str) -> None:
    """Check, without creating anything, that the files of an audit can be written to a folder.

    Args:
        folder: The folder.
        parameter: What it was given by, for the message.

    Raises:
        ConfigError: A file is in its place, or the folder of a file.
        RecordError: It cannot be written.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{parameter}: expected a folder, got {str(folder)!r}, where {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RecordError(f"{parameter}: expected a folder that can be written, {existing} cannot")
    for name in (document.FILE, report.FILE):
        if (folder / name).is_dir():
            raise RecordError(f"{parameter}: expected a file {name} in {folder}, found a folder")
