"""Known deviations: conformance tests that a part declares to fail, with a reason for each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import PluginError, UnknownNameError

Part = tuple[str, str]  # kind and name


def declared(kind: str, name: str) -> dict[str, str]:
    """Return the deviations that a part declares.

    Args:
        kind: Kind of the part, such as "trigger".
        name: Name of the part.

    Returns:
        Reasons by name of the test; empty if the part declares none, cannot be loaded, or has malformed `deviations`.
    """
    given = _attribute(kind, name)
    return dict(given) if _well_formed(given) else {}


def declares(kind: str, name: str) -> bool:
    """Return whether a part has deviations, well formed or not."""
    given = _attribute(kind, name)
    return not (isinstance(given, Mapping) and not given)


class Deviations:
    """The declared deviations of the tested parts, and the outcomes of all cases of their tests."""

    def __init__(self) -> None:
        self._collected: Counter[tuple[Part, str]] = Counter()
        self._outcomes: defaultdict[tuple[Part, str], Counter[str]] = defaultdict(Counter)

    def collect(self, parts: Collection[Part], test: str) -> str | None:
        """Count a case that will run.

        Args:
            parts: The tested parts.
            test: Name of the test.

        Returns:
            The declared reason for a failure; None if no part declares one.
        """
        declaring = {part: reasons[test] for part in parts if test in (reasons := declared(*part))}
        self._collected.update((part, test) for part in declaring)
        return "; ".join(f"{kind} {name}: {reason}" for (kind, name), reason in declaring.items()) or None

    def record(self, parts: Collection[Part], test: str, outcome: str) -> None:
        """Count the outcome of a case: "passed", "failed", "skipped", or "deviates" if it failed as declared."""
        for part in parts:
            self._outcomes[part, test][outcome] += 1

    def faults(self, part: Part, tests: Collection[str] | None) -> list[str]:
        """Return the faults of the deviations of a part, one line each.

        Args:
            part: The part.
            tests: Names of all tests that run on it; None if they are not known because only some files are run.
        """
        if not _well_formed(given := _attribute(*part)):
            return [f"deviations: expected a mapping from names of tests to reasons, got {given!r}"]
        found = []
        for test in given:
            outcomes = self._outcomes[part, test]
            passed = outcomes["passed"]
            # Not if cases were deselected, as with pytest's -k or -x: these may be the failing ones.
            over = outcomes.total() == self._collected[part, test]
            if tests is not None and test not in tests:
                found.append(str(UnknownNameError("deviations", test, tests)))
            elif over and passed and not outcomes["deviates"]:
                times = "" if passed == 1 else f" in all of its {passed} cases"
                found.append(f"deviations: {test} passes{times}; remove it")
        return found


def _attribute(kind: str, name: str) -> Any:
    try:
        return getattr(REGISTRIES[kind].lookup(name), "deviations", {})
    except PluginError:
        return {}


def _well_formed(given: object) -> bool:
    return isinstance(given, Mapping) and all(
        isinstance(text, str) and text.strip() for pair in given.items() for text in pair
    )
