"""Packages as a third party would install them, in folders of their own; and a Python that sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import forked

ROOT = Path(__file__).parents[1]


def python(*arguments: object, path: Sequence[Path], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this Python with `path` on its module search path."""
    search = os.pathsep.join(map(str, [*path, *filter(None, [os.environ.get("PYTHONPATH")])]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search},
    )


def bbmoe(*arguments: object, path: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """Run `bbmoe` with `path` on its module search path, in a process that need not import torch again."""
    with forked(*arguments, path=path) as process:
        return subprocess.CompletedProcess(arguments, process.end(), process.out, process.err)


def pip_install(source: Path, site: Path) -> Path:
    """Install a package into the folder `site`, without network; pip builds in `source`."""
    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check", "--no-deps"]
    done = python(*pip, "--no-build-isolation", "--target", site, source, path=[], cwd=source.parent)
    assert done.returncode == 0, done.stderr
    return site


def put_package(
    site: Path,
    name: str,
    *,
    modules: dict[str, str],
    points: dict[str, list[str]],
    requires: Sequence[str] = (),
) -> None:
    """Write into `site` what pip would leave there of a package, version 0.3.

    modules: text by module name. points: lines by entry-point group, without "backdoorbench_moe.".
    """
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)
    info = site / f"{name.replace('-', '_')}-0.3.dist-info"
    info.mkdir()
    head = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 0.3"]
    (info / "METADATA").write_text(
        "\n".join([*head, *(f"Requires-Dist: {need}" for need in requires)]) + "\n"
    )
    groups = ["\n".join([f"[backdoorbench_moe.{group}]", *lines]) for group, lines in points.items()]
    (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
