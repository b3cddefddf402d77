"""Running the conformance tests on an installed package in a separate process, and collecting the outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.plugins import GROUPS, INTERFACE, Candidate, normalize, strays
from backdoorbench_moe.testing.deviations import Part, declared

Row = dict[str, Any]

# pytest's exit codes: all passed, some failed; and no test is left to run.
FINISHED = (0, 1)
NO_TESTS = 5


@dataclass(frozen=True)
class Failure:
    """A test that a part fails.

    Attributes:
        test: Name of the test.
        failing: Number of its cases that fail.
        cases: Number of its cases.
        case: The first case that fails.
        reason: The error of that case.
        line: The line of code that raised it; empty if the process terminated.
    """

    test: str
    failing: int
    cases: int
    case: str
    reason: str
    line: str


@dataclass(frozen=True)
class Deviation:
    """A test that a part fails as declared in its `deviations`.

    Attributes:
        test: Name of the test.
        failing: Number of its cases that fail.
        cases: Number of its cases.
        reason: The reason that the part gives.
    """

    test: str
    failing: int
    cases: int
    reason: str


@dataclass
class PartCheck:
    """The outcome of the tests of one part.

    Attributes:
        kind: Kind of the part, such as "trigger".
        name: Name of the part.
        result: "passes"; "fails"; or "broken" if the part cannot be used.
        passed: Number of cases that passed.
        failed: Number of cases that failed without a declared deviation.
        skipped: Number of cases that were skipped.
        reason: Why the part is broken, or why none of its tests ran; None otherwise.
        failures: The tests that failed without a declared deviation.
        deviations: The tests that failed as declared.
    """

    kind: str
    name: str
    result: str = "passes"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reason: str | None = None
    failures: list[Failure] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)


@dataclass(frozen=True)
class PackageCheck:
    """The outcome for everything that a package registers.

    Attributes:
        package: Name of the package.
        version: Version of the package.
        interfaces: Interface versions that it supports.
        parts: The outcome for each part, in the order of the kinds.
    """

    package: str
    version: str
    interfaces: tuple[str, ...]
    parts: list[PartCheck]

    @property
    def passes(self) -> bool:
        """Whether every part passes."""
        return all(part.result == "passes" for part in self.parts)


def check_package(package: str, *, timeout: float) -> PackageCheck:
    """Run the conformance tests on every part that an installed package registers.

    A part that cannot be used is reported with the reason and not tested.

    Args:
        package: Name of the package.
        timeout: Time limit for each test in seconds. Has no effect if pytest-timeout is not installed.

    Raises:
        UnknownNameError: The package is not installed.
        ConfigError: The package registers nothing, or pytest is not installed.
        PluginError: The tests did not run to completion.
    """
    candidates = find_candidates(package)
    if find_spec("pytest") is None:
        raise ConfigError("pytest is not installed: pip install 'backdoorbench-moe[plugin]'")
    parts = []
    for candidate in candidates:
        reason = REGISTRIES[candidate.kind].fault(candidate)
        parts.append(
            PartCheck(candidate.kind, candidate.name, "broken" if reason else "passes", reason=reason)
        )
    for stray, reason in strays(package):
        parts.append(PartCheck(stray.kind, stray.name, "broken", reason=reason))
    usable = [part for part in parts if part.result != "broken"]
    if usable:
        own = {(part.kind, part.name) for part in usable}
        rows = _attribute(_run_tests(candidates[0].package, timeout, own), own)
        for part in usable:
            _judge(part, rows[part.kind, part.name])
    first = candidates[0]
    return PackageCheck(first.package, first.version, first.interfaces or (str(INTERFACE),), parts)


def find_candidates(package: str) -> list[Candidate]:
    """Return everything that an installed package registers.

    Raises:
        UnknownNameError: The package is not installed.
        ConfigError: The package registers nothing.
    """
    offers = [candidate for registry in REGISTRIES.values() for candidate in registry.offers()]
    found = [candidate for candidate in offers if normalize(candidate.package) == normalize(package)]
    if found:
        return found
    try:
        version(package)
    except (PackageNotFoundError, ValueError):
        hint = f"; a folder? first: pip install {package}" if Path(package).is_dir() else ""
        known = {normalize(candidate.package) for candidate in offers}
        raise UnknownNameError("package", package, known, hint) from None
    for _, reason in strays(package):
        raise ConfigError(f"package {package!r}: registers nothing: {reason}")
    groups = ", ".join(GROUPS.values())
    raise ConfigError(f"package {package!r}: registers nothing; expected entry points in one of {groups}")


def _run_tests(package: str, timeout: float, own: set[Part]) -> list[Row]:
    """Run the tests on the package's parts `own`, and return a row for every case.

    If a case ends Python, it fails, and the tests are run again without the part that it tests (or without the
    combination, if it tests two of the package's parts), so that the other parts are tested.
    """
    kept: list[Row] = []
    ended: list[set[Part]] = []
    while True:
        rows, end = _run_once(package, timeout, ended)
        if end is None:
            return kept + rows
        team = own.intersection(rows[-1]["parts"].items())
        told = " with ".join(f"{kind} {name}" for kind, name in sorted(team))
        reason = f"{end}; the remaining tests of {told or 'all parts'} were not run"
        rows[-1] |= {"outcome": "failed", "reason": reason, "line": ""}
        if not team:
            return kept + rows
        ended.append(team)
        kept += [row for row in rows if team.issubset(row["parts"].items())]


def _run_once(package: str, timeout: float, without: list[set[Part]]) -> tuple[list[Row], str | None]:
    """Run the tests, except those that test all parts of an item of `without`.

    Returns:
        A row for every case, and how the last one ended Python; None if the tests ran to their end.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    with tempfile.TemporaryDirectory(prefix="bbmoe-check-") as folder:
        report = Path(folder) / "report.jsonl"
        command = [sys.executable, "-m", "backdoorbench_moe.testing", package, f"--bbmoe-report={report}"]
        command += [f"--bbmoe-without={json.dumps(dict(team))}" for team in without]
        if find_spec("pytest_timeout"):
            # This method terminates the process, because compiled code that does not return cannot be interrupted.
            command += [f"--timeout={timeout}", "--timeout-method=thread"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    end = None
    if rows and rows[-1]["outcome"] == "started":
        late = "+ Timeout +" in done.stdout + done.stderr
        end = f"not over after {timeout:g} s" if late else f"Python ended (exit code {done.returncode})"
    elif done.returncode not in FINISHED and not (without and done.returncode == NO_TESTS):
        tail = " ".join((done.stderr or done.stdout).split())[-300:]
        raise PluginError(f"package {package!r}: the tests did not run to their end: {tail}")
    last = len(rows) - 1
    return [row for n, row in enumerate(rows) if row["outcome"] != "started" or (end and n == last)], end


def _attribute(rows: list[Row], own: set[Part]) -> dict[Part, list[Row]]:
    """Return the rows of each part of the package.

    Some tests use two parts. If such a test fails and only one of the two also fails a test without the other, the
    failure is attributed to that part only.
    """
    teams = [own.intersection(row["parts"].items()) for row in rows]
    failing = [(row["outcome"] == "failed", team) for row, team in zip(rows, teams, strict=True)]
    guilty = {part for failed, team in failing if failed and len(team) == 1 for part in team}
    found: dict[Part, list[Row]] = {part: [] for part in own}
    for row, team in zip(rows, teams, strict=True):
        blamed = team & guilty if row["outcome"] == "failed" else team
        for part in blamed or team:
            found[part].append(row)
    return found


def _judge(part: PartCheck, rows: list[Row]) -> None:
    """Fill in the outcome of a part from the rows of its tests."""
    counts = Counter(row["outcome"] for row in rows)
    part.passed, part.failed, part.skipped = (counts[key] for key in ("passed", "failed", "skipped"))
    for test in dict.fromkeys(row["test"] for row in rows if row["outcome"] == "failed"):
        cases = [row for row in rows if row["test"] == test]
        failing = [row for row in cases if row["outcome"] == "failed"]
        first = failing[0]
        part.failures.append(
            Failure(test, len(failing), len(cases), first["case"], first["reason"], first["line"])
        )
    for test, why in declared(part.kind, part.name).items():
        cases = [row for row in rows if row["test"] == test]
        if failing := [row for row in cases if row["outcome"] == "deviates"]:
            part.deviations.append(Deviation(test, len(failing), len(cases), why))
    if not part.passed and not part.failed and not part.deviations:
        part.result, part.reason = "fails", "no test was run over it"
    elif part.failed:
        part.result = "fails"
