"""An audit whose results have a place: an interrupted one goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backdoorbench_moe.auditing.audit import Audit, digest_of, run_audit
from backdoorbench_moe.auditing.opening import with_store
from backdoorbench_moe.auditing.place import FOLDER, check_place, place_in_run
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.engine.progress.observer import Observer


def audit_into(
    subject: Subject,
    *,
    output: Path | None,
    parameter: str,
    run: Path | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> tuple[Audit, list[Path]]:
    """Audit a subject, and write audit.json, report.html and what each check measured to a folder.

    Args:
        subject: The subject.
        output: The folder that the user named; None if he named none.
        parameter: What he names it by, for messages.
        run: The run folder that the audit goes to if no folder was named; None to write nothing then.
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
