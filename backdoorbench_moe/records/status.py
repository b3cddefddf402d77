"""Whether a run is being made right now."""

from __future__ import annotations

import fcntl

from backdoorbench_moe.records import LOCK, Record, RunFolder


def status_of(folder: RunFolder, record: Record) -> str:
    """The status of a run: that of its record, but "interrupted" where the process that made it is gone.

    A process that is killed, or loses its power, leaves a record that says "running".
    """
    return "interrupted" if record.status == "running" and not is_held(folder) else record.status


def is_held(folder: RunFolder) -> bool:
    """Whether another process works in a run folder; also true if that cannot be told."""
    try:
        with (folder.path / LOCK).open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
