"""The fixture that the tests of the commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from backdoorbench_moe import cli


@pytest.fixture
def bbmoe(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Run `bbmoe` in this process, on a terminal of some width; gives exit code, stdout and stderr."""

    def run(*args: object, width: int = 80) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["bbmoe", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run
