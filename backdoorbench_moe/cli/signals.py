"""Signals that ask a process to end, treated as Ctrl-C is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from backdoorbench_moe.signal_handlers import outside_of_imports

# What a cluster's scheduler and `timeout` send, and what a closed terminal does.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


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
    schedulers repeat themselves. A signal that is ignored, as SIGHUP under `nohup`, stays ignored. Outside of the
    main thread, where Python cannot handle signals, nothing is changed.

    Neither these nor Ctrl-C interrupt the import of a module, where the exception may be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: FrameType | None) -> None:
        for each in ended_by:
            # Not SIG_IGN, which processes started from here would inherit.
            signal.signal(each, lambda *_: None)
        raise Terminated(number)

    # None: set by something that is not Python, which is left alone.
    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    handlers = {each: old for each, old in handlers.items() if old not in (signal.SIG_IGN, None)}
    ended_by = tuple(handlers)
    new = {each: outside_of_imports(interrupt) for each in handlers}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = signal.default_int_handler
        new[signal.SIGINT] = outside_of_imports(signal.default_int_handler)
    for each, handler in new.items():
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each, old in handlers.items():
            signal.signal(each, old)
