"""Hostile files are refused by every reader: in one line, without running, writing or allocating what they ask for."""

from __future__ import annotations

import os
import pickle
import resource
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_files import CANARY, HOSTILE
from torch_files import Calls, result, saved

from backdoorbench_moe.data.safe_pickle import read_pickle
from backdoorbench_moe.engine.weights.reading import read_weights
from backdoorbench_moe.errors import BbmoeError
from backdoorbench_moe.interop.attack_result import (
    read_attack_result,
    read_defense_result,
    read_info,
    read_poison_list,
)
from backdoorbench_moe.records.folder import _load_tensors

SECONDS = 1.0
# More than the largest of the files, and far less than what they ask for.
BYTES = 768 << 20


def read_batch(path: Path) -> object:
    if not path.is_file():
        pytest.skip("CIFAR-10's files are opened by their data set")
    return read_pickle(path.read_bytes()[: 64 << 20], str(path))


# A new reader of files that come from elsewhere is one line here.
READERS: dict[str, Callable[[Path], object]] = {
    "attack": read_attack_result,
    "defense": read_defense_result,
    "info": read_info,
    "poison list": read_poison_list,
    "CIFAR-10": read_batch,
    "safetensors": lambda path: _load_tensors(path, "model file"),
    "weights": read_weights,
}


@pytest.fixture
def bounded() -> Iterator[None]:
    """Let the process have only some memory more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def contents(folder: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.lstat().st_size) for path in folder.iterdir())


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 60


def test_the_traps_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary reader of pickles runs them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {CANARY}")))  # noqa: S301
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize("old", [False, True], ids=["archive", "old form"])
def test_the_honest_file_is_read(tmp_path: Path, old: bool) -> None:
    """What the hostile ones are changed from is refused for nothing else."""
    path = tmp_path / "attack_result.pt"
    path.write_bytes(saved(result(), old=old))
    assert read_attack_result(path).test.indices.tolist() == [0, 3]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounded: None
) -> None:
    monkeypatch.chdir(tmp_path)
    path, case = tmp_path / "file.pt", HOSTILE[name]
    case.write(path)
    before = contents(tmp_path)
    started = time.process_time()
    with pytest.raises(BbmoeError, match=case.reason) as refusal:
        READERS[case.reader](path)
    assert time.process_time() - started < SECONDS
    message = str(refusal.value)
    assert str(path) in message and "\n" not in message and message.isprintable() and len(message) < 1000
    assert contents(tmp_path) == before


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_does_what_a_hostile_file_asks_for(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounded: None
) -> None:
    """Each reader gets the files that are meant for others, too: it may find them harmless, or refuse them."""
    monkeypatch.chdir(tmp_path)
    for number, case in enumerate(HOSTILE.values()):
        path = tmp_path / f"{number}.pt"
        case.write(path)
        if path.exists() and stat.S_ISREG(path.stat().st_mode) and path.stat().st_size > 1 << 30:
            path.unlink()
            continue
        before, started = contents(tmp_path), time.process_time()
        try:
            READERS[reader](path)
        except BbmoeError as error:
            assert str(path) in str(error)
        except pytest.skip.Exception:
            pass
        assert time.process_time() - started < SECONDS
        assert contents(tmp_path) == before
