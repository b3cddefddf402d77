"""Signal handlers that may raise exceptions."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

# How often to check whether the import has finished, and how long to wait before calling the handler anyway.
SECONDS_BETWEEN_TRIES = 0.05
PATIENCE_SECONDS = 10.0


def outside_of_imports(handler: Handler) -> Handler:
    """Return a signal handler that calls `handler`, but not while the main thread imports a module.

    An exception raised during an import may be lost: modules catch all exceptions when they look for optional
    packages, and Python converts exceptions in the body of a class. This is not rare, since torch imports a large part
    of itself at the first step of an optimizer.

    The handler is called when the import has finished, or after PATIENCE_SECONDS. Use it in the main thread only.

    Args:
        handler: The handler. It may raise an exception to stop the main thread.
    """
    first: float | None = None
    waits = False

    def called(number: int, frame: FrameType | None) -> None:
        nonlocal first, waits
        first = time.monotonic() if first is None else first
        if not is_importing(frame) or time.monotonic() - first >= PATIENCE_SECONDS:
            first = None
            handler(number, frame)
        elif not waits:
            # One timer at a time: a repeated signal must not be sent again after it has been handled.
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


def is_importing(frame: FrameType | None) -> bool:
    """Return whether this frame was called, directly or indirectly, by the import of a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
