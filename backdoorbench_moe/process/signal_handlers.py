"""Signal handlers that may raise exceptions."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

# How often it is tried whether an import is over, and after how long the handler is called nevertheless.
SECONDS_BETWEEN_TRIES = 0.05
PATIENCE_SECONDS = 10.0


def outside_of_imports(handler: Handler) -> Handler:
    """Return a signal handler that calls `handler`, but not while the main thread imports a module.

    An exception that is raised in the middle of an import may be lost: modules catch everything when they look for
    optional packages, and Python turns exceptions in the body of a class into others. torch imports a large part of
    itself at the first step of an optimizer, so that this is not rare.

    The handler is called when the import is over, or after PATIENCE_SECONDS. To be used in the main thread.

    Args:
        handler: It may raise an exception, which ends the main thread's work.
    """
    first: float | None = None
    waits = False

    def called(number: int, frame: FrameType | None) -> None:
        nonlocal first, waits
        first = time.monotonic() if first is None else first
        if not _imports(frame) or time.monotonic() - first >= PATIENCE_SECONDS:
            first = None
            handler(number, frame)
        elif not waits:
            # One at a time: a signal that is repeated must not be sent on when it has been dealt with.
            waits = True
            timer = threading.Timer(SECONDS_BETWEEN_TRIES, send_again, (number,))
            timer.daemon = True
            timer.start()

    def send_again(number: int) -> None:
        nonlocal waits
        waits = False
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)

    return called


def _imports(frame: FrameType | None) -> bool:
    """Return whether this frame was called, however indirectly, by the import of a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
