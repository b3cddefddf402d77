"""File locks between processes."""

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
        path: The lock file. It is created if needed; its folder must exist.
        what: What the lock protects, for error messages, such as "run folder DIR".
        wait: Function that is called twice a second while another process holds the lock; it may raise an exception to
            stop waiting. If None, it is an error if another process holds the lock.

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
    """Lock the parent folder of a path inside the block, without creating a lock file.

    Waits while another process holds the lock. If the folder cannot be opened, or the file system cannot lock folders,
    the block runs without a lock.

    Args:
        path: A file or folder that need not exist; its parent folder must exist.
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
