"""Write a page to the file given by `--save`."""

from __future__ import annotations

from pathlib import Path


def save_page(page: str, file: Path) -> None:
    """Write a page atomically, and create its folder if it does not exist.

    Raises:
        RecordError: The path is a folder, or the file cannot be written.
    """
    from backdoorbench_moe.errors import RecordError
    from backdoorbench_moe.records import write_atomically

    if file.is_dir():
        raise RecordError(f"--save {file}: expected a file, found a folder")
    for folder in file.parents:
        if folder.is_file():
            raise RecordError(f"--save {file}: expected a file in a folder, {folder} is a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"--save {file}: {error.strerror}") from error
