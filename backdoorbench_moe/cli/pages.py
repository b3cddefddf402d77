"""Writing a page to the file that --save names."""

from __future__ import annotations

from pathlib import Path


def save_page(page: str, file: Path) -> None:
    """Write a page atomically, in a folder that is made if it does not exist.

    Raises:
        RecordError: The file is a folder, or cannot be written.
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
