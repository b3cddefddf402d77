"""What `make test-quick` runs: the first case of every test that is not slow, in every folder of tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quick import mark_quick

ROOT = Path(__file__).parents[1]


class Item:
    """A collected test, as far as the marking asks for it."""

    def __init__(self, nodeid: str, *marks: str) -> None:
        self.nodeid, self.marks = nodeid, [*marks]

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


def test_the_first_case_that_is_not_slow() -> None:
    items = [Item("a[1]"), Item("a[2]"), Item("b[1]", "slow"), Item("b[2]"), Item("b[3]"), Item("c", "slow")]
    mark_quick(items)  # type: ignore[arg-type]
    assert [item.nodeid for item in items if "quick" in item.marks] == ["a[1]", "b[2]"]


@pytest.mark.slow
def test_every_folder_of_tests_is_covered(request) -> None:
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("tests", "plugins", "backdoorbench_moe/testing")
        for path in (ROOT / top).rglob("test_*.py")
    }
    # A run of all tests has collected them already, which takes half a minute; a run of this file has not.
    collected = {item.path.parent.relative_to(ROOT) for item in request.session.items if is_quick(item)}
    assert folders == (collected if collected >= folders else collect_quick())


def is_quick(item: pytest.Item) -> bool:
    return item.get_closest_marker("quick") is not None


def collect_quick() -> set[Path]:
    """The folders of the tests that `pytest -m quick` finds."""
    words = ["--collect-only", "-qq", "-m", "quick", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return {Path(line.partition(":")[0]).parent for line in done.stdout.splitlines() if ".py" in line}
