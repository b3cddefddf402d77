"""Whether a process is working on a run."""

from __future__ import annotations

import fcntl

from backdoorbench_moe.records import LOCK, Record, RunFolder


def status_of(folder: RunFolder, record: Record) -> str:
    """The status in a run's record, or "interrupted" if it is "running" but no process works on the run.

    A killed process or a power failure leaves a record with the status "running".
    """
    return "interrupted" if record.status == "running" and not is_held(folder) else record.status


def is_held(folder: RunFolder) -> bool:
    """Whether another process works on a run folder; also true if this cannot be determined."""
    try:
        with (folder.path / LOCK).open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
