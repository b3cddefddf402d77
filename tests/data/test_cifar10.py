"""CIFAR-10 in all its published forms, and what damaged ones get."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import socket
import tarfile
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from backdoorbench_moe.data import cifar10, create_dataset
from backdoorbench_moe.data.roots import download
from backdoorbench_moe.errors import ConfigError, DataError

NAMES = [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]
Batches = dict[str, tuple[np.ndarray, list[int]]]


@pytest.fixture
def batches(rng: np.random.Generator) -> Batches:
    """Four random images in each of the six files."""
    return {
        name: (rng.integers(0, 256, (4, 3072), np.uint8), rng.integers(0, 10, 4).tolist()) for name in NAMES
    }


def python_files(batches: Batches) -> dict[str, bytes]:
    return {name: pickle.dumps({"data": x, "labels": y}, 2) for name, (x, y) in batches.items()}


def binary_files(batches: Batches) -> dict[str, bytes]:
    return {
        f"{name}.bin": b"".join(bytes([label]) + row.tobytes() for row, label in zip(x, y, strict=True))
        for name, (x, y) in batches.items()
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def archive(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def load(root: Path, **options):
    return create_dataset("cifar10", root=str(root), **options).load()


def check(images, batches: Batches) -> None:
    """Pixel (row, column, channel) of an image lies at channel * 1024 + row * 32 + column of its row."""
    assert images.train.images.shape == (20, 3, 32, 32) and images.test.images.shape == (4, 3, 32, 32)
    pixels, labels = batches["data_batch_2"]
    assert images.train.images[5, 2, 7, 9] == pixels[1, 2 * 1024 + 7 * 32 + 9]
    assert images.train.labels[4:8].tolist() == labels
    np.testing.assert_array_equal(images.test.images.numpy().reshape(4, -1), batches["test_batch"][0])
    assert images.test.labels.tolist() == batches["test_batch"][1]
    assert images.classes[3] == "cat" and images.num_classes == 10


@pytest.mark.parametrize("inside", [True, False], ids=["folder around it", "folder itself"])
@pytest.mark.parametrize("form", ["py", "bin"])
def test_folders(tmp_path, batches, form, inside) -> None:
    files = python_files(batches) if form == "py" else binary_files(batches)
    folder = write(tmp_path / f"cifar-10-batches-{form}", files)
    check(load(tmp_path if inside else folder), batches)


@pytest.mark.parametrize("inside", [True, False], ids=["folder around it", "archive itself"])
@pytest.mark.parametrize("form", ["py", "bin"])
def test_archives_are_read_in_place(tmp_path, batches, form, inside) -> None:
    files = python_files(batches) if form == "py" else binary_files(batches)
    name = "cifar-10-python.tar.gz" if form == "py" else "cifar-10-binary.tar.gz"
    path = archive(tmp_path / name, f"cifar-10-batches-{form}", {"../../evil": b"x", **files})
    check(load(tmp_path if inside else path), batches)
    assert list(tmp_path.iterdir()) == [path] and not (tmp_path.parent / "evil").exists()


def test_every_form_has_the_same_digest(tmp_path, batches) -> None:
    write(tmp_path / "a" / "cifar-10-batches-py", python_files(batches))
    write(tmp_path / "b" / "cifar-10-batches-bin", binary_files(batches))
    one, other = load(tmp_path / "a"), load(tmp_path / "b")
    assert one.digest == other.digest
    assert one.digest != load(tmp_path / "a", train_images=19).digest


def test_root_comes_from_the_environment(tmp_path, batches, monkeypatch) -> None:
    write(tmp_path / "cifar-10-batches-py", python_files(batches))
    monkeypatch.setenv("BBMOE_DATA", str(tmp_path))
    check(create_dataset("cifar10").load(), batches)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    check(load(Path("~") / tmp_path.name), batches)


def test_subset_and_image_size(tmp_path, batches) -> None:
    write(tmp_path / "cifar-10-batches-bin", binary_files(batches))
    images = load(tmp_path, train_images=7, test_images=2, image_size=48)
    assert images.train.images.shape == (7, 3, 48, 48) and images.test.images.shape == (2, 3, 48, 48)
    whole = load(tmp_path)
    kept = load(tmp_path, train_images=7).train
    rows = [int((whole.train.images == image).flatten(1).all(1).nonzero()) for image in kept.images]
    assert rows == sorted(set(rows)) and kept.labels.tolist() == whole.train.labels[rows].tolist()


@pytest.mark.parametrize("options", [{"image_size": 0}, {"train_images": 21}, {"train_images": 0}])
def test_options_out_of_range(tmp_path, batches, options) -> None:
    write(tmp_path / "cifar-10-batches-bin", binary_files(batches))
    with pytest.raises(ConfigError, match=f"dataset: {next(iter(options))}: expected"):
        load(tmp_path, **options)


def test_missing_data_says_where_it_looked_and_what_helps(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist.*--data-root.*--download"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds none of.*cifar-10-batches-py.*--data-root"):
        load(tmp_path)


def test_missing_file(tmp_path, batches) -> None:
    folder = write(tmp_path / "cifar-10-batches-py", python_files(batches))
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 0]}, r"data: expected bytes \(N, 3072\)"),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
            "expected a label for each of 2 images, got 1",
        ),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]},
            r"expected labels in 0\.\.9, got 0\.\.10",
        ),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10**30]}, r"labels: expected numbers in 0\.\.9"),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": ["0", "1"]},
            "labels: expected a list of integers",
        ),
        (
            {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]},
            "labels: expected a list of integers",
        ),
        ({"data": [0], "labels": [0]}, "data: expected bytes"),
    ],
)
def test_wrong_content_names_the_file(tmp_path, batches, content, message) -> None:
    folder = write(tmp_path / "cifar-10-batches-py", python_files(batches))
    (folder / "data_batch_4").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match=f"data_batch_4: {message}"):
        load(tmp_path)


def test_malicious_batch_is_refused(tmp_path, batches) -> None:
    folder = write(tmp_path / "cifar-10-batches-py", python_files(batches))
    (folder / "test_batch").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(DataError, match=r"test_batch: refused global os\.system"):
        load(tmp_path)


def test_cut_binary_file(tmp_path, batches) -> None:
    files = binary_files(batches)
    files["data_batch_1.bin"] = files["data_batch_1.bin"][:-1]
    write(tmp_path / "cifar-10-batches-bin", files)
    with pytest.raises(DataError, match=r"data_batch_1\.bin: expected rows of 3073 bytes, got 12291 bytes"):
        load(tmp_path)


def test_damaged_archives(tmp_path, batches) -> None:
    path = archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_files(batches))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: expected CIFAR-10's archive"):
        load(path)
    path.write_bytes(gzip.compress(b"no archive" * 100))
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: expected CIFAR-10's archive"):
        load(path)


def test_a_link_in_the_archive_is_not_followed(tmp_path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match="data_batch_1: expected a plain file"):
        load(path)


@pytest.fixture
def published(tmp_path, batches, monkeypatch) -> Path:
    """An archive that stands for the published one, behind a file: address."""
    (tmp_path / "server").mkdir()
    path = archive(
        tmp_path / "server" / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_files(batches)
    )
    monkeypatch.setattr(cifar10, "URL", path.as_uri())
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_download_is_kept_and_used_again(tmp_path, batches, published) -> None:
    root = tmp_path / "new" / "root"
    check(load(root, download=True), batches)
    assert [path.name for path in root.iterdir()] == ["cifar-10-python.tar.gz"]
    published.unlink()
    check(load(root, download=True), batches)


def test_download_with_another_checksum_keeps_nothing(tmp_path, published, monkeypatch) -> None:
    monkeypatch.setattr(cifar10, "MD5", "0" * 32)
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match=r"expected the published MD5 0{32}, got .*nothing was kept"):
        load(tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []


def test_download_without_network(tmp_path, published) -> None:
    published.unlink()
    with pytest.raises(DataError, match=r"cannot be fetched into .*--data-root"):
        load(tmp_path / "root", download=True)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"Content-Length: many\r\n\r\nabc", "many"),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", "IncompleteRead"),
        (b"Content-Length: 3\r\n\r\nabc", "expected the published MD5"),
    ],
    ids=["a length that is no number", "an answer that breaks off", "other bytes"],
)
def test_an_answer_of_a_server_that_cannot_be_used_keeps_nothing(tmp_path, monkeypatch, answer, said) -> None:
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "root").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + answer)

        thread = Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"
        with pytest.raises(DataError, match=said):
            download(url, tmp_path / "root", "0" * 32)
        thread.join(10)
    assert list((tmp_path / "root").iterdir()) == []


def test_real_sample(samples) -> None:
    images = load(samples)
    assert len(images.train) == 2000 and len(images.test) == 1000
    # The channel means published for the full set; a sample of 2,000 comes near.
    means = images.train.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), atol=0.01)
    assert images.train.labels.bincount(minlength=10).min() > 0
