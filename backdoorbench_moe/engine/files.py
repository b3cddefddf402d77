"""Files that a spec's options name: part of the spec by their content, not by their path."""

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

# A larger file is not copied into the run folder; it has to stay where it is.
KEPT_BYTES = 4 << 20
FILES = "files"


@dataclass(frozen=True)
class Named:
    """A file, or a folder of several, that an option of a spec names.

    Attributes:
        path: The file or folder.
        counted: Suffixes of the files that count in a folder.
    """

    path: Path
    counted: tuple[str, ...] = ()

    def contents(self) -> list[Path]:
        """The file itself; of a folder the files that count, by name."""
        if self.path.is_file():
            return [self.path]
        return sorted(file for file in self.path.iterdir() if file.suffix in self.counted)

    def sha256(self) -> str:
        """SHA-256 of the file, hex; of a folder, that of the names and hashes of the files that count.

        Raises:
            RecordError: A file cannot be read.
        """
        if self.path.is_file():
            return sha256_of(self.path)
        lines = (f"{sha256_of(file)}  {file.name}\n" for file in self.contents())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def named_files(spec: RunSpec) -> Iterator[tuple[str, Named]]:
    """Every file that an option of the spec names, by the option's key; a run folder stands for its model file.

    An option that names a folder of several files gives the folder; a file in it stands for it.

    Values that name nothing on disk are left out: the part itself says what it expected.
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
    """The file that an option's value names, or the folder with files that could count, if there is one."""
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
    """Put the SHA-256 of every named file into the spec, and its absolute path into the option.

    A hash that the spec holds already is checked, see `check_files`.

    Raises:
        RecordError: A file cannot be read, or is not the one that the spec was made with.
    """
    found = dict(named_files(spec))
    if not found and not spec.files:
        return spec
    check_files(spec)
    hashes = {key: spec.files.get(key) or named.sha256() for key, named in found.items()}
    pinned = spec.with_options({key: str(named.path) for key, named in found.items()})
    return replace(pinned, files={**spec.files, **hashes})


def check_files(spec: RunSpec) -> None:
    """Check the files that the spec holds the hashes of.

    A model reads its file only when training starts, and then says itself if it is missing; a trained model does not
    need it, and a victim does not need that of its surrogate.

    Raises:
        RecordError: A file has another content now, or is missing and not that of a model.
    """
    found = dict(named_files(spec))
    for key, known in spec.files.items():
        if key not in found and key.startswith(("model.", "surrogate.", "mixture.")):
            continue
        if key not in found:
            raise RecordError(f"{key}: the file that the run was made with is not there any more")
        if (now := found[key].sha256()) != known:
            raise RecordError(
                f"{key}: {found[key].path} has changed: expected a file of SHA-256 {known[:16]}, found {now[:16]}"
            )


def keep_files(
    spec: RunSpec, folder: RunFolder, known: Iterable[NamedFile] = (), *, all_of_trigger: bool = False
) -> list[NamedFile]:
    """Describe the named files for the record, and copy the small ones into the run folder.

    A large one is copied, too, if a run that this one is made from has a copy.

    Args:
        spec: The spec, with the hashes of its files.
        folder: The run folder.
        known: The files of the runs that this one is made from. A file that is one of them keeps its name, while its
            path may be that of a copy.
        all_of_trigger: Whether large files of the trigger are copied, too, as a part of the run.
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
        RecordError: A file, or its copy, is missing or not the one that the run was made with.
    """
    copies = {file["key"]: str((folder.path / file["kept"]).absolute()) for file in files if file["kept"]}
    located = spec.with_options(copies)
    check_files(located)
    return located


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex.

    Raises:
        RecordError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
