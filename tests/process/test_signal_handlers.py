"""Signals that arrive while a module is imported."""

from __future__ import annotations

import importlib
import signal
import sys
import time

import pytest

from backdoorbench_moe.process import signal_handlers
from backdoorbench_moe.process.signal_handlers import outside_of_imports


class Asked(Exception):
    pass


def ask(*_: object) -> None:
    raise Asked


@pytest.fixture
def handled():
    old = signal.signal(signal.SIGUSR1, outside_of_imports(ask))
    yield
    signal.signal(signal.SIGUSR1, old)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Import a module with this body."""

    def made(body: str) -> None:
        (tmp_path / "signalled.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "signalled", raising=False)
        importlib.import_module("signalled")

    return made


SIGNALLED = "import signal\nsignal.raise_signal(signal.SIGUSR1)\n"
SWALLOWS = f"""
try:
    {SIGNALLED.replace(chr(10), chr(10) + "    ")}
except Exception:
    pass
whole = True
"""
CLASS_BODY = """
import signal
class Field:
    def __set_name__(self, owner, name):
        signal.raise_signal(signal.SIGUSR1)
class Box:
    field = Field()
whole = True
"""


def wait() -> None:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("body", [SWALLOWS, CLASS_BODY])
def test_an_import_is_finished_first(handled, module, body) -> None:
    module(body)
    assert sys.modules["signalled"].whole
    with pytest.raises(Asked):
        wait()


def test_otherwise_the_handler_is_called_at_once(handled) -> None:
    with pytest.raises(Asked):
        signal.raise_signal(signal.SIGUSR1)


def test_a_repeated_signal_is_handled_once(handled, module) -> None:
    module(SIGNALLED * 5)
    with pytest.raises(Asked):
        wait()
    started = time.monotonic()
    while time.monotonic() < started + 4 * signal_handlers.SECONDS_BETWEEN_TRIES:
        time.sleep(0.01)


def test_an_import_without_end_is_interrupted(handled, module, monkeypatch) -> None:
    monkeypatch.setattr(signal_handlers, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(Asked):
        module(SIGNALLED + "import time\ntime.sleep(5)")
