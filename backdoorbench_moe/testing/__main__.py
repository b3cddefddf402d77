"""`python -m backdoorbench_moe.testing [PACKAGE] [flags]`: the conformance tests with pytest's output."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """Run the tests in this folder with pytest and return its exit code."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: pip install 'backdoorbench-moe[plugin]'", file=sys.stderr)
        return 2
    import pytest

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--bbmoe-package", *arguments]
    # Ignore settings, caches and conftest files of the current folder.
    alone = ["-c", os.devnull, "--rootdir", str(HERE), "-p", "no:cacheprovider", "--import-mode=importlib"]
    return int(pytest.main([str(HERE), *alone, *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
