"""A suite's page with links to the records, from run folders or from a results folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backdoorbench_moe.bench.pages.found import read_folder, read_runs, relative_link
from backdoorbench_moe.bench.pages.page import page, run_command, suite_words
from backdoorbench_moe.bench.suites.suite import Suite, order
from backdoorbench_moe.bench.tables.results import ResultSet, read_manifest


@dataclass(frozen=True)
class Drawn:
    """The page of a suite.

    Attributes:
        page: HTML.
        finished: Number of finished runs of the suite, including clean twins.
        total: Number of runs of the suite.
        command: The command that runs the missing ones.
    """

    page: str
    finished: int
    total: int
    command: str

    @property
    def missing(self) -> str:
        """A line about the missing runs and the command that runs them; "" if none is missing."""
        if self.finished == self.total:
            return ""
        if not self.finished:
            return f"none of {self.total} runs is finished; to run them: {self.command}"
        verb = "is" if self.finished == 1 else "are"
        return f"{self.finished} of {self.total} runs {verb} finished; to run the others: {self.command}"


def draw_report(
    suite: Suite,
    name: str,
    *,
    start: Path,
    runs: Path,
    source: Path | None = None,
    options: Mapping[str, object] | None = None,
) -> Drawn:
    """Draw the page of a suite as HTML.

    Args:
        suite: The suite.
        name: Its name in commands: name of the suite, or path of its file.
        start: Folder of the page, to which the links to records are relative.
        runs: Folder of run folders; read unless `source` is given.
        source: A results folder of the suite.
        options: The options of `bbmoe report` that produce this page, by name; options that are None are left out. With
            "published", links to records begin with this address.

    Raises:
        RecordError: A record or the results folder is damaged, or the folder is that of another suite, scale or
            version.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if source is None:
        found = read_runs(suite, runs)
    else:
        read_manifest(source)
        found = read_folder(suite, source)
    results = ResultSet.of(suite, (each.record for each in found.values()))
    published = given.get("published")
    link = relative_link(start, None if published is None else str(published), source)
    flags = [f"--{key} {shlex.quote(str(value))}" for key, value in given.items()]
    again = [run_command(suite, name), " ".join([f"bbmoe report {suite_words(suite, name)}", *flags])]
    if source is None and "output" in given:
        again[0] += f" --output {shlex.quote(str(given['output']))}"
    if source is not None:
        beside = f"--with {shlex.quote(str(source))}"
        again[0] += f" {beside}"
        again.insert(
            1, f"bbmoe bench table {suite_words(suite, name)} {beside} --save {shlex.quote(str(source))}"
        )
    text = page(results, again=again, address=lambda digest: link(found[digest]))
    return Drawn(text, len(results.finished()), sum(1 for _ in order(suite)), again[0])
