"""Finding the folders of data sets and downloading published archives."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import wrap_file

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.paths import CACHE

VARIABLE = "BBMOE_DATA"
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30


def data_root(root: str | None) -> Path:
    """Return the folder or archive to read.

    Args:
        root: A path; a leading "~" is replaced by the home directory. If None or empty, the environment variable
            BBMOE_DATA is used, or the user's cache folder if that is not set.

    Raises:
        DataError: The user in "~user" does not exist.
    """
    try:
        return Path(root or os.environ.get(VARIABLE) or CACHE).expanduser()
    except RuntimeError as error:  # "~someone" who does not exist.
        raise DataError(f"dataset: root: {root}: {error}") from error


def missing(what: str, root: Path, names: str, hint: str) -> DataError:
    """Return the error for a data set that was not found.

    Args:
        what: Name of the data set.
        root: The folder that was searched.
        names: Names of the expected files and folders.
        hint: Further advice, added to the end of the message.
    """
    if root.is_dir():
        state = "holds none of"
    else:
        state = f"{'is a file' if root.exists() else 'does not exist'}; expected a folder with one of"
    return DataError(
        f"{what}: {root} {state}: {names}; name its folder with --data-root (root=) or ${VARIABLE}{hint}"
    )


def download(url: str, folder: Path, md5: str) -> Path:
    """Download a file. It gets its name only after its checksum was verified.

    Args:
        url: Address of the file.
        folder: Folder to write to; it is created if needed.
        md5: The published MD5, in hexadecimal.

    Returns:
        Path of the file.

    Raises:
        DataError: The file cannot be downloaded or written, or has another MD5.
    """
    target = folder / url.rpartition("/")[2]
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    got = _copy(response, file, target.name)
                if got != md5:
                    raise DataError(f"{url}: expected the published MD5 {md5}, got {got}; nothing was kept")
                Path(partial).replace(target)
            finally:
                Path(partial).unlink(missing_ok=True)
    # URLError, timeouts and a full or read-only disk are OSErrors. An incomplete response raises HTTPException, and a
    # header that is not a number ValueError.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(
            f"{url}: cannot be fetched into {folder} ({error}); fetch it by hand and use --data-root (root=)"
        ) from error
    return target


def _copy(response, file, name: str) -> str:  # type: ignore[no-untyped-def]
    digest = hashlib.md5(usedforsecurity=False)
    length = int(response.headers.get("Content-Length") or 0)
    with wrap_file(response, length, description=name, console=Console(stderr=True)) as reader:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
