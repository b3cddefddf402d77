"""An exception that a signal raised: lost, dealt with, or repeated."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import os, signal, time
from backdoorbench_moe.cli.terminal import signals
signals.GRACE_SECONDS = 0.3

def be_asked():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    print("not interrupted")

try:
    with signals.interrupt_on_signals():
{block}
except signals.Terminated as error:
    print("ended by", error)
"""


def ends(block: str) -> list[str]:
    """Run a block in a process, in which it may be asked to end; what it printed."""
    script = START.format(block="\n".join(f"        {line}" for line in block.strip().splitlines()))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("losing", ["except BaseException:", "except KeyboardInterrupt:"])
def test_an_exception_that_is_lost_is_raised_again(losing) -> None:
    block = f"""
for number in range(2):
    try:
        be_asked() if not number else time.sleep(10)
    {losing}
        pass
    print("lost", number)
time.sleep(10)
"""
    assert ends(block) == ["lost 0", "lost 1", "ended by SIGTERM"]


def test_an_exception_that_is_dealt_with_is_not_raised_again() -> None:
    block = """
try:
    be_asked()
except KeyboardInterrupt:
    time.sleep(1)
    print("written")
    raise
finally:
    time.sleep(1)
    print("closed")
"""
    assert ends(block) == ["written", "closed", "ended by SIGTERM"]


def test_nor_is_one_that_became_another() -> None:
    block = """
try:
    be_asked()
except KeyboardInterrupt as error:
    try:
        raise ValueError from error
    except ValueError:
        time.sleep(1)
        print("written")
    raise
"""
    assert ends(block) == ["written", "ended by SIGTERM"]


def test_signals_that_are_repeated_do_nothing() -> None:
    block = """
try:
    be_asked()
finally:
    for _ in range(5):
        os.kill(os.getpid(), signal.SIGTERM)
    print("closed")
"""
    assert ends(block) == ["closed", "ended by SIGTERM"]
