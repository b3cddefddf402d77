"""Pytest configuration: selection of parts, known deviations, and a report of all outcomes."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

# One thread, set before torch is imported: the models are small, and sums then do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The cache of decoded images is deleted after the tests.
if "BBMOE_CACHE" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="bbmoe-cache-")
    os.environ["BBMOE_CACHE"] = CACHE.name

import pytest

from backdoorbench_moe.testing.deviations import Deviations, Part, declares
from backdoorbench_moe.testing.selection import Selection, kind_of

HERE = Path(__file__).parent
CHOSEN = pytest.StashKey[Selection]()
DEVIATIONS = pytest.StashKey[Deviations]()
# Names of the tests by the part that they run on, and the names of their files.
TESTS = pytest.StashKey[defaultdict[Part, set[str]]]()
FILES = pytest.StashKey[set[str]]()
DEVIATING = "deviating_part"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `bbmoe plugin check` uses."""
    group = parser.getgroup("backdoorbench_moe")
    group.addoption("--bbmoe-package", metavar="NAME", help="test only what this installed package registers")
    group.addoption(
        "--bbmoe-report", metavar="FILE", help="append a line of JSON for every test to this file"
    )
    group.addoption(
        "--bbmoe-without",
        metavar="JSON",
        type=json.loads,
        action="append",
        default=[],
        help="leave out the tests of these parts, a name by kind; may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Select the parts."""
    config.stash[DEVIATIONS] = Deviations()
    tests: defaultdict[Part, set[str]] = defaultdict(set)
    config.stash[TESTS] = tests
    config.stash[FILES] = set()
    config.addinivalue_line(
        "markers",
        "only(interface, without=None): run over the parts that have this interface and not the other",
    )
    config.stash[CHOSEN] = Selection(config.getoption("--bbmoe-package", None))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests by their arguments: `trigger_name`, or `defense_name` and `model_name`, and so on."""
    stash = metafunc.config.stash
    stash[FILES].add(metafunc.definition.path.name)
    if DEVIATING in metafunc.fixturenames:
        parts = [part for part in stash[CHOSEN].parts() if declares(*part)]
        metafunc.parametrize(DEVIATING, parts or [None], ids=" ".join if parts else None, scope="session")
    kinds = tuple(kind for kind in map(kind_of, metafunc.fixturenames) if kind)
    if kinds:
        only = metafunc.definition.get_closest_marker("only")
        rows = stash[CHOSEN].rows(kinds, **(only.kwargs if only else {}))
        for row in rows:
            for part in zip(kinds, row, strict=True):
                stash[TESTS][part].add(metafunc.definition.originalname)
        names = [f"{kind}_name" for kind in kinds]
        metafunc.parametrize(names, rows or [(None,) * len(kinds)], scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests without a part or of parts left out, and mark failures that a part declares as expected."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    left_out = config.getoption("--bbmoe-without", [])
    without = [
        item
        for item in ours
        if None in _names(item).values() or any(each.items() <= _names(item).items() for each in left_out)
    ]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]
    for item in ours:
        if item not in without and (reason := config.stash[DEVIATIONS].collect(_parts(item), _test(item))):
            # Not strict for each case: a part may deviate for one type of images only. See test_deviations.py.
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
    items.sort(key=lambda item: DEVIATING in getattr(item, "fixturenames", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Report that a test starts, since a part may terminate Python."""
    _write(item, {"outcome": "started"})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report the outcome of a test, or of a fixture that failed."""
    report = yield
    if report.when == "call" or not report.passed:
        reason = _reason(call.excinfo) if report.failed and call.excinfo is not None else {}
        outcome = "deviates" if report.skipped and hasattr(report, "wasxfail") else report.outcome
        item.config.stash[DEVIATIONS].record(_parts(item), _test(item), outcome)
        _write(item, {"outcome": outcome, **reason})
    return report


@pytest.fixture(scope="session")
def partner_models(pytestconfig: pytest.Config) -> list[str]:
    """The models on which a defense is tested."""
    return pytestconfig.stash[CHOSEN].partners("model")


@pytest.fixture(scope="session")
def deviation_faults(pytestconfig: pytest.Config) -> Callable[[Part], list[str]]:
    """A function that returns the faults of the deviations of a part."""
    stash = pytestconfig.stash
    complete = stash[FILES] >= {path.name for path in HERE.glob("test_*.py")}
    return lambda part: stash[DEVIATIONS].faults(part, stash[TESTS][part] if complete else None)


def _write(item: pytest.Item, row: dict[str, Any]) -> None:
    if path := item.config.getoption("--bbmoe-report", None):
        row = {"parts": _names(item), "test": _test(item), "case": item.name, **row}
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _test(item: pytest.Item) -> str:
    """Return the name of the test without its case."""
    return str(getattr(item, "originalname", item.name))


def _names(item: pytest.Item) -> dict[str, Any]:
    """Return the names of the parts that a test runs on, by kind; a name is None if there is no such part."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if DEVIATING in params:
        return dict([params[DEVIATING] or (DEVIATING, None)])
    return {kind: value for key, value in params.items() if (kind := kind_of(key))}


def _parts(item: pytest.Item) -> list[Part]:
    return list(_names(item).items())


def _reason(error: pytest.ExceptionInfo[BaseException]) -> dict[str, str]:
    """Return the error in one line, and the line of code that raised it, outside torch if possible."""
    if isinstance(error.value, pytest.fail.Exception) and not error.value.pytrace:
        return {"reason": str(error.value), "line": ""}
    lines = [line.strip() for line in error.exconly().splitlines()]
    told = [line for line in lines if line and not line.startswith(("assert ", "+ ", "where "))]
    entries = [entry for entry in error.traceback if "torch" not in Path(entry.path).parts]
    last = (entries or error.traceback)[-1]
    statement = " ".join(str(last.statement).split())
    return {
        "reason": "; ".join(told[:3]),
        "line": f"{Path(last.path).name}:{last.lineno + 1}: {statement}",
    }
