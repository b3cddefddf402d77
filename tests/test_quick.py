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
def test_every_folder_of_tests_is_covered() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-qq",
        "-m",
        "quick",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    covered = {Path(line.partition(":")[0]).parent for line in done.stdout.splitlines() if ".py" in line}
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("tests", "plugins", "backdoorbench_moe/testing")
        for path in (ROOT / top).rglob("test_*.py")
    }
    assert covered == folders
