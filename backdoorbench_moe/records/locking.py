"""Locks, by which only one process at a time does something."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from backdoorbench_moe.errors import RecordError


@contextlib.contextmanager
def hold(path: Path, what: str, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file inside the block. The operating system releases it if the process is killed.

    Args:
        path: The file, which is created; its folder exists.
        what: What the lock is for, for error messages, such as "run folder DIR".
        wait: Function that is called twice a second while another process holds the lock; an exception that it raises
            ends the waiting. If None, a lock that another process holds is an error.

    Raises:
        RecordError: Another process holds the lock, or the file cannot be written or locked.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RecordError(f"output folder {path.parent}: {error.strerror}") from error
    with file:
        if not _try(file.fileno(), path):
            if wait is None:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RecordError(f"{what}: in use by another process ({holder})")
            wait()
            while not _try(file.fileno(), path):
                time.sleep(0.5)
                wait()
        file.seek(0)
        file.truncate()
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield


@contextlib.contextmanager
def hold_place(path: Path) -> Iterator[None]:
    """Hold the lock of the folder that a file or folder lies in, inside the block; no file is left behind.

    Another process that holds it is waited for. Where the folder cannot be opened, or the file system cannot lock
    folders, nothing is held.

    Args:
        path: The file or folder, which need not exist; the folder that it lies in exists.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(path.absolute().parent, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _try(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # For example, a network file system without locks.
        raise RecordError(f"output folder {path.parent}: cannot be locked: {error.strerror}") from error
    return True
