"""The cache of decoded images."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorbench_moe.data import create_dataset, decoded, images
from backdoorbench_moe.data.base import content_digest
from backdoorbench_moe.data.decoded import HEADER_BYTES, decoded_images
from backdoorbench_moe.data.images import Form, read_images
from backdoorbench_moe.errors import BbmoeWarning, DataError
from backdoorbench_moe.image_files import decode_content, read_content
from backdoorbench_moe.ops.stored_images import StoredImages

SIZE = 8
ROW = 3 * SIZE * SIZE


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("BBMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def files(tmp_path, rng) -> list[Path]:
    """Ten images, just written."""
    return write(tmp_path / "files", rng)


def write(folder: Path, rng: np.random.Generator, count: int = 10) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def settled(monkeypatch) -> None:
    """Take files as settled at once."""
    monkeypatch.setattr(decoded, "SETTLED_NS", -(10**12))


class Decoded:
    """Which files were decoded, and which were read."""

    def __init__(self, monkeypatch) -> None:
        self.decoded: list[str] = []
        self.read: list[str] = []

        def decode(content, path, **options):
            self.decoded.append(path.name)
            return decode_content(content, path, **options)

        def read(path):
            self.read.append(path.name)
            return read_content(path)

        for module in (images, decoded):
            monkeypatch.setattr(module, "decode_content", decode)
            monkeypatch.setattr(module, "read_content", read)


@pytest.fixture
def work(monkeypatch) -> Decoded:
    return Decoded(monkeypatch)


def load(files: list[Path]) -> torch.Tensor:
    return decoded_images(files, Form(SIZE, crop=True))


def entry(cache: Path) -> Path:
    [path] = cache.glob("*.images")
    return path


@pytest.mark.usefixtures("settled")
def test_the_second_run_decodes_and_reads_nothing(files, work, cache) -> None:
    expected = read_images(files, Form(SIZE, crop=True))
    work.decoded.clear()
    assert torch.equal(load(files), expected) and len(work.decoded) == 10
    work.read.clear()
    assert torch.equal(load(files), expected) and len(work.decoded) == 10 and not work.read
    assert not [path for path in cache.iterdir() if "partial" in path.name]


def test_files_that_are_younger_than_two_seconds_are_read_but_not_decoded(files, work) -> None:
    load(files)
    work.read.clear()
    load(files)
    assert len(work.decoded) == 10 and len(work.read) == 10


@pytest.mark.usefixtures("settled")
def test_a_copy_of_the_folder_is_read_but_not_decoded(files, work, tmp_path) -> None:
    expected = load(files)
    shutil.copytree(files[0].parent, tmp_path / "copy")
    assert torch.equal(load([tmp_path / "copy" / path.name for path in files]), expected)
    assert len(work.decoded) == 10


@pytest.mark.usefixtures("settled")
def test_another_content_with_the_size_and_time_of_the_old_one_is_noticed(files, tmp_path) -> None:
    for path in files:
        Image.new("RGB", (9, 12)).save(path.with_suffix(".bmp"))
    files = [path.with_suffix(".bmp") for path in files]
    before, facts = load(files), files[3].stat()
    Image.new("RGB", (9, 12), "white").save(files[3])
    os.utime(files[3], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (files[3].stat().st_size, files[3].stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    after = load(files)
    assert after[3].min() == 255 and before[3].max() == 0 and torch.equal(after[:3], before[:3])


@pytest.mark.parametrize("change", ["order", "size", "crop", "fewer"])
def test_what_decides_about_the_pixels_decides_about_the_entry(files, cache, change) -> None:
    before = load(files)
    options = {"size": SIZE, "crop": True}
    if change == "order":
        files = files[::-1]
    elif change == "fewer":
        files = files[:5]
    else:
        options[change] = {"size": 4, "crop": False}[change]
    found = decoded_images(files, Form(**options))
    assert torch.equal(found, read_images(files, Form(**options))) and len(list(cache.glob("*.images"))) == 2
    assert not torch.equal(found, before)


def cut(content: bytes) -> bytes:
    return content[:-1]


def half(content: bytes) -> bytes:
    return content[: HEADER_BYTES + 4 * ROW]


def longer(content: bytes) -> bytes:
    return content + b"\0"


def other_table(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def other_key(content: bytes) -> bytes:
    header = json.loads(content[:HEADER_BYTES])
    return json.dumps({**header, "key": "0" * 64}).encode().ljust(HEADER_BYTES) + content[HEADER_BYTES:]


def no_header(content: bytes) -> bytes:
    return b"{}".ljust(HEADER_BYTES) + content[HEADER_BYTES:]


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "damage", [cut, half, longer, other_table, other_key, no_header, zeros, lambda content: b""]
)
def test_an_entry_that_is_not_whole_is_made_again(files, cache, work, damage) -> None:
    expected, path = load(files), entry(cache)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert torch.equal(load(files), expected) and len(work.decoded) == 20
    assert path.read_bytes() == content


@pytest.mark.usefixtures("settled")
def test_a_damaged_image_alone_is_decoded_again(files, cache, work) -> None:
    expected, path = load(files), entry(cache)
    content = path.read_bytes()
    place = HEADER_BYTES + 6 * ROW + 1
    path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    assert torch.equal(load(files), expected) and work.decoded[10:] == ["6.png"]
    assert path.read_bytes() == content


def test_more_images_than_memory_may_hold_are_stored_and_have_the_same_digest(
    tmp_path, rng, monkeypatch, cache
) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name, rng)
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / "data" / name)
    options = {"root": str(tmp_path / "data"), "image_size": SIZE, "train_images": 12}
    whole = create_dataset("folder", **options).load()
    monkeypatch.setenv("BBMOE_MEMORY", str(8 * ROW))
    stored = create_dataset("folder", **options).load()
    assert isinstance(stored.train.images, StoredImages) and not isinstance(stored.test.images, StoredImages)
    assert torch.equal(stored.train.images.read(), whole.train.images) and stored.image_size == SIZE
    assert stored.digest == whole.digest == content_digest(stored)
    [memo] = cache.glob("*.digest")
    memo.write_text("f" * 64)
    assert create_dataset("folder", **options).load().digest == "f" * 64  # It is read, not computed.
    memo.write_text("damaged")
    assert create_dataset("folder", **options).load().digest == whole.digest
    other = create_dataset("folder", **{**options, "train_images": 11}).load()
    assert other.digest not in (whole.digest, "f" * 64)


def test_faults_of_files_are_those_without_a_cache_and_leave_nothing(files, cache, monkeypatch) -> None:
    files[4].write_bytes(b"no picture")
    files[7].write_bytes(b"")
    with pytest.raises(DataError, match=r"4\.png: cannot be read as an image .*; 1 more of 10 files"):
        load(files)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    files[4].unlink()
    with pytest.raises(DataError, match=r"4\.png: cannot be read"):
        load(files)


@pytest.mark.usefixtures("settled")
def test_frames_are_warned_of_at_every_run(files) -> None:
    frames = [Image.new("RGB", (9, 9), (value, 0, 0)) for value in (1, 2)]
    files[2] = files[2].with_suffix(".gif")
    frames[0].save(files[2], save_all=True, append_images=frames[1:])
    for _ in range(2):
        with pytest.warns(BbmoeWarning, match=r"1 file has several frames or pages, such as .*2\.gif"):
            load(files)


def no_folder(monkeypatch, tmp_path) -> str:
    (tmp_path / "cache").touch()
    return r"cache/decoded: decoded images cannot be kept here \(Not a directory\); set \$BBMOE_CACHE"


def no_space(monkeypatch, tmp_path) -> str:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return r"10 decoded images of 8x8 need 0\.0 MB, and 0\.0 MB are free; set \$BBMOE_CACHE"


def full_disk(monkeypatch, tmp_path) -> str:
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    return r"decoded images cannot be kept here \(No space left on device\)"


@pytest.mark.parametrize("fault", [no_folder, no_space, full_disk])
def test_a_cache_that_cannot_be_used_is_an_error_only_for_what_does_not_fit(
    files, cache, monkeypatch, tmp_path, fault
) -> None:
    expected = read_images(files, Form(SIZE, crop=True))
    message = fault(monkeypatch, tmp_path)
    with pytest.warns(BbmoeWarning, match=message):
        assert torch.equal(load(files), expected)
    monkeypatch.setenv("BBMOE_MEMORY", "1KB")
    with pytest.raises(DataError, match=message):
        load(files)
    if cache.is_dir():
        assert [path.suffix for path in cache.iterdir()] == [".lock"]


def _load_slowly(files: list[Path], log: Path, done: Path) -> None:
    """Decode with a pause, and log which files were decoded."""

    def decode(content, path, **options):
        time.sleep(0.05)
        with log.open("a") as out:
            out.write(f"{path.name}\n")
        return decode_content(content, path, **options)

    images.decode_content = decode
    torch.save(load(files), done)


@pytest.mark.slow
def test_of_two_processes_that_start_at_once_one_decodes(files, tmp_path) -> None:
    fork, log = multiprocessing.get_context("fork"), tmp_path / "log"
    workers = [fork.Process(target=_load_slowly, args=(files, log, tmp_path / f"done{n}")) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    expected = read_images(files, Form(SIZE, crop=True))
    assert all(torch.equal(torch.load(tmp_path / f"done{n}"), expected) for n in range(2))
    assert sorted(log.read_text().split()) == sorted(path.name for path in files)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_whole(files, tmp_path, cache, work) -> None:
    log = tmp_path / "log"
    worker = multiprocessing.get_context("fork").Process(
        target=_load_slowly, args=(files, log, tmp_path / "done")
    )
    worker.start()
    while not log.exists():
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert not list(cache.glob("*.images")) and list(cache.glob(".*.partial"))
    assert torch.equal(load(files), read_images(files, Form(SIZE, crop=True)))
    assert entry(cache) and not list(cache.glob(".*.partial"))
