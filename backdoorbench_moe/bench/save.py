"""Results folders: the records of a suite with its tables and plots, small enough to be committed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.bench.pages.page import page
from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.bench.tables import render
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.plots import draw, file_names
from backdoorbench_moe.bench.tables.results import (
    MANIFEST,
    RECORDS,
    ResultSet,
    check_manifest,
    manifest_of,
    read_lines,
    record_lines,
)
from backdoorbench_moe.bench.tables.tidy import environments, tidy_csv
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import write_atomically
from backdoorbench_moe.records.locking import hold_place

PLOTS = "plots"


def save_results(results: ResultSet, folder: Path | str) -> list[Path]:
    """Write or update the results folder of a suite.

    Files are replaced atomically. Equal records give equal bytes.

    Returns:
        The files of the folder.

    Raises:
        RecordError: The folder is that of another suite, scale or version, is not a results folder, or contains
            finished runs that these results lack. Nothing is written in this case.
    """
    folder = Path(folder)
    # Only finished runs are kept, so a running one is shown as missing, as it is when the folder is redrawn.
    results = replace(results, records={record.digest: record for record in results.finished()})
    _make(folder.parent, folder)
    # Locked, so that a process with fewer runs cannot pass the check just before another one saves more.
    with hold_place(folder):
        _check(results, folder)
        return _write(results, folder, _contents(results, [record.digest for record in results.finished()]))


def redraw_results(suite: Suite, folder: Path | str) -> list[Path]:
    """Redraw the tables, plots and page of a results folder from its own records.

    The records are not changed, as they are the measured data.

    Returns:
        The written files.

    Raises:
        RecordError: The folder is not a results folder of this suite, scale and version.
    """
    folder = Path(folder)
    # So that tables are not drawn from records that another process is replacing.
    with hold_place(folder):
        results = ResultSet.from_folder(suite, folder)
        lines = [record.digest for record in read_lines(folder)]
        contents = {name: content for name, content in _contents(results, lines).items() if name != RECORDS}
        return _write(results, folder, contents)


def _write(results: ResultSet, folder: Path, contents: dict[str, bytes]) -> list[Path]:
    _make(folder / PLOTS, folder)
    # The manifest first: it identifies a folder that was left incomplete as a results folder.
    for name, content in contents.items():
        write_atomically(folder / name, _put(content))
    for file in (folder / PLOTS).iterdir():
        if file.suffix in (".svg", ".png") and f"{PLOTS}/{file.name}" not in contents:
            file.unlink()
    if not results.suite.plots:
        _remove_empty(folder / PLOTS)
    return [folder / name for name in contents]


def _contents(results: ResultSet, lines: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of the files of a results folder; `lines` are the digests of the lines of its records."""
    places = {digest: f"{RECORDS}#L{number}" for number, digest in enumerate(lines, 1)}
    sheet = build_sheet(results)
    plots = results.suite.plots
    drawn = {form: [draw(results, plot, form) for plot in plots] for form in ("svg", "png")}
    texts = {
        MANIFEST: _json(manifest_of(results)),
        RECORDS: "".join(f"{line}\n" for line in record_lines(results)),
        "tidy.csv": tidy_csv(results),
        "table.csv": render.statistics_csv(results),
        "table.md": render.markdown(sheet),
        "table.tex": render.latex(sheet),
        "environment.json": _json(environments(results)),
        "index.html": page(results, drawn["svg"], address=places.get),
    }
    contents = {name: text.encode("utf-8") for name, text in texts.items()}
    for form, files in drawn.items():
        for name, file in zip(file_names(plots), files, strict=True):
            contents[f"{PLOTS}/{name}.{form}"] = file
    return contents


def _check(results: ResultSet, folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RecordError(f"results folder {folder}: expected a folder, found a file")
    if not any(folder.iterdir()):
        return
    check_manifest(results.suite, folder)
    if not (folder / RECORDS).exists():
        return
    kept = {record.digest for record in results.finished()}
    lost = [record for record in read_lines(folder) if record.digest not in kept]
    if lost:
        raise RecordError(
            f"results folder {folder}: holds {len(lost)} finished runs that are not among these, such as "
            f"{lost[0].run_spec.name}; use another folder, or draw from this one"
        )


def _make(place: Path, folder: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"results folder {folder}: {error.strerror}") from error


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _put(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
