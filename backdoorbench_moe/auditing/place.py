"""The folder that an audit is written to: one audit does not overwrite that of another model or of other images."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.auditing.store import CHECKS, read_values
from backdoorbench_moe.errors import ConfigError

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
