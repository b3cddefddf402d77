"""A disk cache of decoded images, shared by all runs and processes of a user.

Its folder is `decoded` in $BBMOE_CACHE (~/.cache/backdoorbench_moe by default). It can be deleted at any time. Files:

- `COUNTxSIDE-KEY.images` holds decoded images. KEY is a hash of the contents of the image files in order, the image
  size and the versions of the decoders, so equal files in another folder are not decoded again.
- `SIGNATURE.key` holds the KEY of some files. SIGNATURE is a hash of their paths, sizes, inodes, modification times and
  change times, so unchanged files are not read. Programs can restore a modification time, but not a change time.
- `SIGNATURE.lock` is held by the process that decodes these files.
- `HASH.digest` holds the digest of a complete data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor

from backdoorbench_moe.data.base import ImageSet, Split, content_digest, draw_subset
from backdoorbench_moe.data.images import Form, decode_files, fitted_pixels, read_images, warn_of_frames
from backdoorbench_moe.errors import BbmoeWarning, DataError, RecordError, naming
from backdoorbench_moe.image_files import decode_content, read_content
from backdoorbench_moe.ops.image_rows import FileRows, check_space, memory_limit, write_at
from backdoorbench_moe.ops.stored_images import StoredImages
from backdoorbench_moe.paths import cache_root
from backdoorbench_moe.records.atomic import write_atomically
from backdoorbench_moe.records.locking import hold

# Image files with their class numbers.
Files = list[tuple[Path, int]]

FOLDER = "decoded"
# Incremented when the format of the files or the decoding changes.
VERSION = 1
HEADER_BYTES = 4096
# Libraries that Pillow uses for decoding; different versions may give different pixels.
CODECS = ("jpg", "libjpeg_turbo", "webp", "avif", "jpg_2000")
CHECKSUM_TYPE = np.dtype("<u4")
# A file may change again within the resolution of its timestamps. Signatures of more recent files are not stored.
SETTLED_NS = 2 * 10**9


class CacheFault(DataError):
    """The cache cannot be used."""


def decoded_images(paths: Sequence[Path], form: Form) -> Tensor:
    """Return the images of files, from the cache if possible, otherwise decoded.

    Args:
        paths: N files.
        form: How the images are resized.

    Returns:
        (N, 3, size, size) uint8: a tensor in memory, or `StoredImages` if they exceed `memory_limit`. If they do not
        and the cache cannot be used, they are decoded into memory with a warning.

    Raises:
        DataError: A file is missing, damaged or not accepted, see `read_images`; or the images exceed the memory limit
            and the cache cannot be written.
    """
    files = _Files(paths, form)
    fits = len(paths) * files.row_bytes <= memory_limit()
    try:
        rows = _Cache(cache_root() / FOLDER, files).rows()
    except CacheFault as error:
        if not fits:
            raise
        warnings.warn(f"{error}; the images are decoded at every run", BbmoeWarning, stacklevel=2)
        return read_images(paths, form)
    stored = StoredImages([rows])
    return stored.read() if fits else stored


def read_split(files: Files, form: Form, count: int | None, name: str) -> Split:
    """Read the images of a split that are kept, see `draw_subset`, from the cache if possible.

    Args:
        files: All image files of the split, with their class numbers.
        form: How the images are resized.
        count: Number of images to keep; all if None.
        name: "train_images" or "test_images".

    Raises:
        ConfigError: There are fewer than `count` images.
        DataError: See `decoded_images`.
    """
    kept = [files[index] for index in draw_subset(len(files), count, name).tolist()]
    images = decoded_images([path for path, _ in kept], form)
    return Split(images, torch.tensor([label for _, label in kept], dtype=torch.int64))


def with_digest(images: ImageSet) -> ImageSet:
    """Return images with their digest if some are stored on disk. The digest is computed once and cached."""
    splits = (images.train, images.test)
    if not any(isinstance(split.images, StoredImages) for split in splits):
        return images
    known = hashlib.sha256()
    for split in splits:
        if isinstance(split.images, StoredImages):
            for source in split.images.sources:
                assert isinstance(source, FileRows)
                known.update(Path(source.name).name.encode())
            known.update(split.images.rows.numpy().data)
        else:
            known.update(split.images.numpy().data)
        known.update(split.labels.numpy().data)
    path = cache_root() / FOLDER / f"{known.hexdigest()}.digest"
    if (digest := _read_hash(path)) is None:
        digest = content_digest(images)
        _keep_hash(path, digest)
    return replace(images, digest=digest)


@dataclass(frozen=True)
class _Files:
    """The files to decode, and how."""

    paths: Sequence[Path]
    form: Form

    @property
    def size(self) -> int:
        return self.form.size

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    @property
    def row_bytes(self) -> int:
        return 3 * self.size * self.size

    @property
    def decoder(self) -> bytes:
        """What determines the pixels, apart from the files."""
        codecs = [features.version(name) for name in CODECS if name in features.get_supported()]
        return f"{VERSION} {self.form} {PIL.__version__} {codecs}\n".encode()

    def signature(self) -> tuple[str, int]:
        """Return a hash that changes with the files (see the module) and the latest time of a change, in ns."""
        digest, newest = hashlib.sha256(self.decoder), 0
        for path in self.paths:
            try:
                facts = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            newest = max(newest, facts.st_mtime_ns, facts.st_ctime_ns)
            digest.update(os.fsencode(path.absolute()))
            times = f"{facts.st_mtime_ns} {facts.st_ctime_ns}"
            digest.update(f"\0{facts.st_size} {times} {facts.st_ino}\n".encode())
        return digest.hexdigest(), newest

    def key(self, hashes: Sequence[bytes]) -> str:
        """Return the key of files with these hashes."""
        return hashlib.sha256(self.decoder + b"".join(hashes)).hexdigest()

    def decode(self, row: int) -> np.ndarray:
        """Decode one file."""
        path = self.paths[row]
        image, _ = decode_content(read_content(path), path, convert=self.form.convert)
        with naming(str(path)):
            return fitted_pixels(image, self.form)


class _Cache:
    """The decoded images of some files in the cache."""

    def __init__(self, folder: Path, files: _Files) -> None:
        self.folder, self.files = folder, files
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def rows(self) -> FileRows:
        """Return the images. The first process decodes them, and the others wait for it."""
        signature, newest = self.files.signature()
        settled = newest + SETTLED_NS < time.time_ns()
        key_file = self.folder / f"{signature}.key"
        key = _read_hash(key_file)
        if key is not None and (rows := self._open(key)) is not None:
            return rows
        try:
            with hold(self.folder / f"{signature}.lock", "cache of decoded images", wait=lambda: None):
                key = _read_hash(key_file) or self._hash_files()
                rows = None if key is None else self._open(key)
                if key is None or rows is None:
                    key = self._write(self.folder / f".{signature}.partial")
                    rows = self._open(key)
                if settled and self.files.signature()[0] == signature:
                    _keep_hash(key_file, key)
        except RecordError as error:  # Of the lock.
            raise CacheFault(str(error)) from error
        if rows is None:
            raise CacheFault(f"{self._path(key)}: cannot be read after it was written")
        return rows

    def _path(self, key: str) -> Path:
        return self.folder / f"{len(self.files.paths)}x{self.files.size}-{key}.images"

    def _hash_files(self) -> str | None:
        """Read the files and return their key; None if the cache has no images of this number and size."""
        if not any(self.folder.glob(self._path("*").name)):
            return None
        return self.files.key([hashlib.sha256(read_content(path)).digest() for path in self.files.paths])

    def _open(self, key: str) -> FileRows | None:
        """Open a file of images; None if it is missing or incomplete."""
        path, count = self._path(key), len(self.files.paths)
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(HEADER_BYTES))
                file.seek(HEADER_BYTES + count * self.files.row_bytes)
                table = file.read()
                if header["key"] != key or len(table) != 4 * count or zlib.crc32(table) != header["table"]:
                    return None
                warn_of_frames(self.files.paths, header["frames"])
                descriptor = os.dup(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheFault(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, IndexError):
            return None
        return FileRows(
            descriptor,
            str(path),
            count,
            self.files.shape,
            offset=HEADER_BYTES,
            checksums=np.frombuffer(table, CHECKSUM_TYPE),
            repair=self.files.decode,
        )

    def _write(self, partial: Path) -> str:
        """Decode the files, write their images to the cache and return their key.

        Args:
            partial: The file to write to. Only the process that holds the lock writes it, so an existing one was left
                by a killed process.
        """
        count, row_bytes = len(self.files.paths), self.files.row_bytes
        try:
            partial.unlink(missing_ok=True)
            size = HEADER_BYTES + count * (row_bytes + 4)
            try:
                check_space(
                    self.folder, size, f"{count:,} decoded images of {self.files.size}x{self.files.size}"
                )
            except DataError as error:
                raise CacheFault(str(error)) from None
            checksums, hashes = np.zeros(count, CHECKSUM_TYPE), [b""] * count
            with partial.open("wb") as file:

                def put(start: int, images: np.ndarray, contents: Sequence[bytes]) -> None:
                    for row, content in enumerate(contents):
                        hashes[start + row] = hashlib.sha256(content).digest()
                        checksums[start + row] = zlib.crc32(images[row])
                    write_at(file.fileno(), images, HEADER_BYTES + start * row_bytes)

                frames = decode_files(self.files.paths, self.files.form, put)
                key, table = self.files.key(hashes), checksums.tobytes()
                header = json.dumps({"key": key, "table": zlib.crc32(table), "frames": frames})
                write_at(file.fileno(), np.frombuffer(header.encode().ljust(HEADER_BYTES), np.uint8), 0)
                write_at(file.fileno(), checksums, HEADER_BYTES + count * row_bytes)
                os.fsync(file.fileno())
            partial.replace(self._path(key))
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return key


def _unwritable(folder: Path, error: OSError) -> CacheFault:
    return CacheFault(
        f"{folder}: decoded images cannot be kept here ({error.strerror}); set $BBMOE_CACHE to another folder"
    )


def _read_hash(path: Path) -> str | None:
    """Read a file with a hash; None if it is missing or has other content."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else None


def _keep_hash(path: Path, text: str) -> None:
    """Write a file with a hash. If that fails, the hash is computed again next time."""
    with suppress(RecordError):
        write_atomically(path, lambda partial: partial.write_text(text + "\n", encoding="ascii"))
