"""The output folder of an audit. An audit does not overwrite that of another model or of other images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backdoorbench_moe.auditing.audit import Audit, digest_of, run_audit
from backdoorbench_moe.auditing.opening import with_store
from backdoorbench_moe.auditing.store import CHECKS, read_values
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.errors import ConfigError

FOLDER = "audit"
# Number of characters of a subject's digest in the name of a folder.
SHOWN = 8


def audit_into(
    subject: Subject,
    *,
    output: Path | None,
    parameter: str,
    run: Path | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> tuple[Audit, list[Path]]:
    """Audit a subject, and write audit.json, report.html and the results of the checks to a folder.

    Args:
        subject: The subject.
        output: The folder given by the user; None without one.
        parameter: Name of the parameter for the folder, for messages.
        run: The run folder to write to if no folder was given; None to write nothing in this case.
        observer: Receives progress.
        settings: `name`, `checks`, `calibration` and `budget`, see `run_audit`.

    Returns:
        The audit, and the paths of audit.json and report.html; no paths if nothing was written.

    Raises:
        ConfigError: `output` has the audit of another subject.
        RecordError: A file cannot be written.
    """
    observer = observer or Observer()
    digest = digest_of(subject)
    if output is not None:
        check_place(output, digest, parameter)
    elif run is not None:
        output = place_in_run(run, digest)
        if output.name != FOLDER:
            observer.on_message(
                f"{run / FOLDER} has the audit with other images, base or device; this one goes to {output}"
            )
    subject, store = with_store(subject, output, digest)
    audit = run_audit(subject, store=store, observer=observer, **settings)
    return audit, [] if output is None else audit.save(output)


def place_in_run(run: Path, digest: str) -> Path:
    """Return the folder of an audit in a run folder.

    It is `audit`, or `audit-DIGEST` if `audit` contains the audit of another subject, such as one with other images.

    Args:
        run: The run folder.
        digest: Identifies the subject, see `audit.digest_of`.
    """
    usual = run / FOLDER
    return run / f"{FOLDER}-{digest[:SHOWN]}" if has_others(usual, digest) else usual


def check_place(folder: Path, digest: str, parameter: str) -> None:
    """Check that a folder given by the user does not contain the audit of another subject.

    Args:
        folder: The folder; it need not exist.
        digest: Identifies the subject.
        parameter: Name of the parameter for the folder, for the message.

    Raises:
        ConfigError: It contains one.
    """
    if has_others(folder, digest):
        raise ConfigError.expected(
            parameter,
            "a folder without the audit of another model, or of this one with other images, base or device; "
            "choose another folder or remove this one",
            str(folder),
        )


def has_others(folder: Path, digest: str) -> bool:
    """Return whether a folder contains results of other subjects and none of this one."""
    read = [read_values(file) for file in sorted((folder / CHECKS).glob("*.json"))]
    subjects = {str(values["subject"]) for values in read if values is not None and "subject" in values}
    return bool(subjects) and digest not in subjects
