"""Which parts the tests run over, and a report of what came of each test."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

# One thread, before torch loads: the models are small, and the same sums are made on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from backdoorbench_moe.testing.selection import Selection, kind_of

HERE = Path(__file__).parent
CHOSEN = pytest.StashKey[Selection]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer what `bbmoe plugin check` sets."""
    group = parser.getgroup("backdoorbench_moe")
    group.addoption("--bbmoe-package", metavar="NAME", help="test only what this installed package registers")
    group.addoption(
        "--bbmoe-report", metavar="FILE", help="append a line of JSON for every test to this file"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the parts."""
    config.addinivalue_line("markers", "only(interface): run over the models that have this interface")
    config.stash[CHOSEN] = Selection(config.getoption("--bbmoe-package", None))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test the names it asks for: `trigger_name`, or `defense_name` and `model_name`, and so on."""
    kinds = tuple(kind for kind in map(kind_of, metafunc.fixturenames) if kind)
    if kinds:
        only = metafunc.definition.get_closest_marker("only")
        rows = metafunc.config.stash[CHOSEN].rows(kinds, only.kwargs["interface"] if only else None)
        names = [f"{kind}_name" for kind in kinds]
        metafunc.parametrize(names, rows or [(None,) * len(kinds)], scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of this folder for which there is no part."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    without = [item for item in ours if None in _names(item).values()]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Write that a test begins: a part may end Python."""
    _write(item, {"outcome": "started"})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write what came of a test, or of making what it needs."""
    report = yield
    if report.when == "call" or not report.passed:
        reason = _reason(call.excinfo) if report.failed and call.excinfo is not None else {}
        _write(item, {"outcome": report.outcome, **reason})
    return report


@pytest.fixture(scope="session")
def partner_models(pytestconfig: pytest.Config) -> list[str]:
    """The models a defense is tried on."""
    return pytestconfig.stash[CHOSEN].partners("model")


def _write(item: pytest.Item, row: dict[str, Any]) -> None:
    if path := item.config.getoption("--bbmoe-report", None):
        test = getattr(item, "originalname", item.name)
        row = {"parts": _names(item), "test": test, "case": item.name, **row}
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _names(item: pytest.Item) -> dict[str, Any]:
    """The names a test runs over, by kind."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return {kind: value for key, value in params.items() if (kind := kind_of(key))}


def _reason(error: pytest.ExceptionInfo[BaseException]) -> dict[str, str]:
    """The error in one line, and the line it came from, torch's own aside."""
    lines = [line.strip() for line in error.exconly().splitlines()]
    told = [line for line in lines if line and not line.startswith(("assert ", "+ ", "where "))]
    entries = [entry for entry in error.traceback if "torch" not in Path(entry.path).parts]
    last = (entries or error.traceback)[-1]
    statement = " ".join(str(last.statement).split())
    return {
        "reason": "; ".join(told[:3]),
        "line": f"{Path(last.path).name}:{last.lineno + 1}: {statement}",
    }
