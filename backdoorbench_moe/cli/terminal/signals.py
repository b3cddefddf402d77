"""Signals that ask a process to end, treated as Ctrl-C is."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from backdoorbench_moe.process.signal_handlers import outside_of_imports

# What a cluster's scheduler and `timeout` send, and what a closed terminal does.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# An exception that nothing deals with after this time was lost.
GRACE_SECONDS = 15.0


class Terminated(KeyboardInterrupt):
    """The process was asked to end by a signal.

    It is a KeyboardInterrupt so that all that happens on Ctrl-C happens here, too: the run is recorded as
    interrupted, and other processes are told to stop.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raise `Terminated` in the main thread when the first of SIGNALS arrives inside the block.

    Further ones do nothing, so that the record can be written: `timeout` signals a process and then its group, and
    schedulers repeat themselves. But if the exception was lost, as in a library that catches everything, it is raised
    again. A signal that is ignored, as SIGHUP under `nohup`, stays ignored. Outside of the main thread, where Python
    cannot handle signals, nothing is changed.

    Neither these nor Ctrl-C interrupt the import of a module, where the exception may be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None: set by something that is not Python, which is left alone.
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
    """A signal handler that raises `Terminated`, and again as long as nothing deals with the exception."""

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
        """The block has ended."""
        self._ended.set()

    def _remind(self, number: int) -> None:
        """Send the signal again and again; whether anything is to be done is seen in the main thread."""
        main = threading.main_thread().ident
        assert main is not None
        while not self._ended.wait(GRACE_SECONDS):
            signal.pthread_kill(main, number)


def _is_handled(error: BaseException) -> bool:
    """Whether an exception, or one that it led to, is being dealt with: in an `except` or `finally`, or by `with`."""
    current = sys.exc_info()[1]
    while current is not None and current is not error:
        current = current.__cause__ or current.__context__
    return current is error
