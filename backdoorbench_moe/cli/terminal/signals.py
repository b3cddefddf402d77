"""Treat signals that ask a process to end like Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from backdoorbench_moe.process.signal_handlers import outside_of_imports

# Sent by cluster schedulers and `timeout`, and when a terminal is closed.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# Seconds after which an exception that nothing handles counts as lost.
GRACE_SECONDS = 15.0


class Terminated(KeyboardInterrupt):
    """Raised when a signal asks the process to end.

    A subclass of KeyboardInterrupt, so that it has the same effects as Ctrl-C: the run is recorded as interrupted, and
    other processes are told to stop.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raise `Terminated` in the main thread when the first of SIGNALS arrives inside the block.

    Further signals are ignored, so that the record can be written: `timeout` signals a process and then its group, and
    schedulers repeat their signals. If the exception is lost, for example in a library that catches everything, it is
    raised again. A signal that is already ignored, such as SIGHUP under `nohup`, stays ignored. Outside of the main
    thread, where Python cannot handle signals, nothing is changed.

    Neither these signals nor Ctrl-C interrupt the import of a module, where the exception may be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None: the handler was not installed by Python; leave it alone.
    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    handlers = {each: old for each, old in handlers.items() if old not in (signal.SIG_IGN, None)}
    interrupter = _Interrupter()
    new = {each: outside_of_imports(interrupter) for each in handlers}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = signal.default_int_handler
        new[signal.SIGINT] = outside_of_imports(signal.default_int_handler)
    for each, handler in new.items():
        signal.signal(each, handler)
    try:
        yield
    finally:
        interrupter.stop()
        for each, old in handlers.items():
            signal.signal(each, old)


class _Interrupter:
    """A signal handler that raises `Terminated`, again and again until something handles the exception."""

    def __init__(self) -> None:
        self._raised: Terminated | None = None
        self._when = 0.0
        self._ended = threading.Event()

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self._raised is None:
            threading.Thread(target=self._remind, args=(number,), daemon=True).start()
        elif time.monotonic() - self._when < GRACE_SECONDS or _is_handled(self._raised):
            return
        self._raised, self._when = Terminated(number), time.monotonic()
        raise self._raised

    def stop(self) -> None:
        """Stop repeating the signal, at the end of the block."""
        self._ended.set()

    def _remind(self, number: int) -> None:
        """Send the signal repeatedly; the main thread decides whether to raise again."""
        main = threading.main_thread().ident
        assert main is not None
        while not self._ended.wait(GRACE_SECONDS):
            signal.pthread_kill(main, number)


def _is_handled(error: BaseException) -> bool:
    """Whether an exception, or one that it caused, is being handled by an `except`, `finally` or `with`."""
    current = sys.exc_info()[1]
    while current is not None and current is not error:
        current = current.__cause__ or current.__context__
    return current is error
