"""Files that options of a spec name: the spec covers their content, not their paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import BbmoeError, RecordError
from backdoorbench_moe.options import COUNTED, NamesFolder
from backdoorbench_moe.paths import expand
from backdoorbench_moe.records import MODEL, NamedFile, RunFolder

# A larger file is not copied into the run folder and must stay where it is.
KEPT_BYTES = 4 << 20
FILES = "files"


@dataclass(frozen=True)
class Named:
    """A file, or a folder of several files, that an option of a spec names.

    Attributes:
        path: The file or folder.
        counted: Suffixes of the files in a folder that belong to the spec.
    """

    path: Path
    counted: tuple[str, ...] = ()

    def contents(self) -> list[Path]:
        """The file itself, or the files with a counted suffix in a folder, sorted by name."""
        if self.path.is_file():
            return [self.path]
        return sorted(file for file in self.path.iterdir() if file.suffix in self.counted)

    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal; for a folder, over the names and hashes of its `contents`.

        Raises:
            RecordError: A file cannot be read.
        """
        if self.path.is_file():
            return sha256_of(self.path)
        lines = (f"{sha256_of(file)}  {file.name}\n" for file in self.contents())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def named_files(spec: RunSpec) -> Iterator[tuple[str, Named]]:
    """Yield the key of every option of the spec that names a file, and the file.

    For a run folder, this is its model file. For an option that names a folder of several files, it is the folder,
    which may also be given by a file in it.

    Values that do not exist on disk are left out: the part itself raises an error for them.
    """
    for kind, start, part in spec.options_by_key():
        paths = {name: path for name, value in part.options.items() if (path := _find(value)) is not None}
        # The part is imported only if one of its options could name a file.
        options = REGISTRIES[kind].options(part.name) if paths else {}
        for name, path in paths.items():
            if name not in options or not options[name].names_file(part.options[name]):
                continue
            if counted := options[name].counted:
                yield f"{start}{name}", Named(path if path.is_dir() else path.parent, counted)
            elif (file := path / MODEL if path.is_dir() else path).is_file():
                yield f"{start}{name}", Named(file)
    for key, value in ({} if spec.mixture is None else spec.mixture.weights_by_key()).items():
        if (folder := _find(value)) is not None:
            yield key, Named(folder if folder.is_dir() else folder.parent, NamesFolder.counted)


def _find(value: object) -> Path | None:
    """The existing file that an option's value names, or the folder that contains files with a counted suffix."""
    try:
        path = expand(value) if isinstance(value, str) and value else None
        if path is None or not (
            path.is_file() or (path.is_dir() and any(file.suffix in COUNTED for file in path.iterdir()))
        ):
            return None
        return path.absolute()
    except (OSError, ValueError, BbmoeError):  # A text that cannot be a path.
        return None


def pin_files(spec: RunSpec) -> RunSpec:
    """Add the SHA-256 of every named file to the spec, and make the paths in its options absolute.

    Hashes that the spec already contains are checked; see `check_files`.

    Raises:
        RecordError: A file cannot be read, or does not have the hash in the spec.
    """
    found = dict(named_files(spec))
    if not found and not spec.files:
        return spec
    check_files(spec)
    hashes = {key: spec.files.get(key) or named.sha256() for key, named in found.items()}
    pinned = spec.with_options({key: str(named.path) for key, named in found.items()})
    return replace(pinned, files={**spec.files, **hashes})


def check_files(spec: RunSpec) -> None:
    """Check the files whose hashes the spec contains.

    Files of models may be missing: a model reads its file only when training starts, and then raises an error itself. A
    trained model does not need its file, and a victim does not need that of its surrogate.

    Raises:
        RecordError: The content of a file has changed, or a file other than that of a model is missing.
    """
    found = dict(named_files(spec))
    for key, known in spec.files.items():
        if key not in found and key.startswith(("model.", "surrogate.", "mixture.")):
            continue
        if key not in found:
            raise RecordError(f"{key}: the file that the run used no longer exists")
        if (now := found[key].sha256()) != known:
            raise RecordError(
                f"{key}: {found[key].path} has changed: expected a file with SHA-256 {known[:16]}, found {now[:16]}"
            )


def keep_files(
    spec: RunSpec, folder: RunFolder, known: Iterable[NamedFile] = (), *, all_of_trigger: bool = False
) -> list[NamedFile]:
    """Describe the named files for the record, and copy the small ones into the run folder.

    A large file is also copied if a run that this one is built from has a copy.

    Args:
        spec: The spec, with the hashes of its files.
        folder: The run folder.
        known: The files of the runs that this one is built from. One of these files keeps its name, even if its path is
            that of a copy.
        all_of_trigger: Whether to copy large files of the trigger, too, as a part of the run.
    """
    known = list(known)
    names = {file["sha256"]: file["name"] for file in known}
    copied = {file["sha256"] for file in known if file["kept"]}
    kept = []
    for key, named in named_files(spec):
        if key in spec.files:
            path, size = named.path, sum(file.stat().st_size for file in named.contents())
            sha256 = spec.files[key]
            small = size <= KEPT_BYTES or sha256 in copied or (all_of_trigger and key.startswith("trigger."))
            keep = small and path.is_file()
            copy = f"{FILES}/{key}{path.suffix}" if keep else None
            if copy is not None:
                folder.keep(copy, path)
            name = names.get(sha256, path.name)
            kept.append(NamedFile(key=key, name=name, sha256=sha256, bytes=size, kept=copy))
    return kept


def locate_files(spec: RunSpec, files: list[NamedFile], folder: RunFolder) -> RunSpec:
    """Return the spec of a run with each file option set to the copy in the run folder, if there is one.

    Raises:
        RecordError: A file or its copy is missing, or its content has changed.
    """
    copies = {file["key"]: str((folder.path / file["kept"]).absolute()) for file in files if file["kept"]}
    located = spec.with_options(copies)
    check_files(located)
    return located


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        RecordError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
