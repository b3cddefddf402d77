"""Locations of the records of a suite, and the addresses with which pages link to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backdoorbench_moe.bench.suites.suite import Suite, order
from backdoorbench_moe.bench.tables.results import RECORDS, ResultSet, check_manifest, read_lines
from backdoorbench_moe.records import Record


@dataclass(frozen=True)
class Found:
    """A finished record and its location.

    Attributes:
        record: The record.
        file: The file that contains it.
        line: Its line in the file, from 1; None if it is the only record in the file.
    """

    record: Record
    file: Path
    line: int | None = None


# Returns the address of a record, relative to a page.
Link = Callable[[Found], str]


def read_folder(suite: Suite, folder: Path) -> dict[str, Found]:
    """Read the records of a results folder, by digest; empty if the folder does not exist.

    Raises:
        RecordError: The folder is damaged, or that of another suite, scale or version.
    """
    if not folder.exists():
        return {}
    check_manifest(suite, folder)
    wanted = {spec.digest for spec in order(suite)}
    lines = enumerate(read_lines(folder), 1)
    return {
        record.digest: Found(record, folder / RECORDS, line)
        for line, record in lines
        if record.digest in wanted
    }


def read_runs(suite: Suite, runs: Path) -> dict[str, Found]:
    """Read the records of a suite from a folder of run folders, by digest, finished or not."""
    results = ResultSet.from_runs(suite, runs)
    return {
        digest: Found(record, runs / record.run_spec.name / "record.json")
        for digest, record in results.records.items()
    }


def relative_link(start: Path, published: str | None = None, folders: Path | None = None) -> Link:
    """Return a function that returns the addresses of records.

    Args:
        start: Folder of the page.
        published: URL at which the folder of results folders is published; None for relative paths.
        folders: The folder of results folders; given if `published` is.
    """
    from urllib.parse import quote

    def link(found: Found) -> str:
        line = "" if found.line is None else f"#L{found.line}"
        if published is not None and folders is not None:
            path = os.path.relpath(found.file, folders)
            return f"{published.rstrip('/')}/{quote(Path(path).as_posix())}{line}"
        return f"{quote(Path(os.path.relpath(found.file, start)).as_posix())}{line}"

    return link
