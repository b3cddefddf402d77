"""Stored images against the tensor that they stand for."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.errors import ConfigError, DataError, PluginError
from backdoorbench_moe.ops import stored_images
from backdoorbench_moe.ops.image_rows import FileRows, Scratch, TensorRows, check_space, memory_limit
from backdoorbench_moe.ops.images import Split, change_images, concatenate, content_order
from backdoorbench_moe.ops.prefetch import prefetched
from backdoorbench_moe.ops.stored_images import StoredImages, replaced

SHAPE = (3, 4, 4)
BYTES = 48


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (20, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def in_file(images: torch.Tensor, path, **options) -> StoredImages:
    """Write images to a file, after 7 other bytes."""
    path.write_bytes(b"7 bytes" + images.numpy().tobytes())
    rows = FileRows(os.open(path, os.O_RDONLY), str(path), len(images), SHAPE, offset=7, **options)
    return StoredImages([rows])


@pytest.fixture(params=["file", "memory", "both"])
def stored(request, images, tmp_path) -> StoredImages:
    if request.param == "file":
        return in_file(images, tmp_path / "images")
    if request.param == "memory":
        return StoredImages([TensorRows(images)])
    return concatenate(
        [
            Split(in_file(images[:7], tmp_path / "images"), torch.zeros(7)),
            Split(StoredImages([TensorRows(images[7:])]), torch.zeros(13)),
        ]
    ).images


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path) -> None:
    """Hold up to five images in memory."""
    monkeypatch.setenv("BBMOE_MEMORY", str(5 * BYTES))
    monkeypatch.setenv("BBMOE_CACHE", str(tmp_path / "cache"))


INDICES = [
    3,
    -1,
    slice(2, 5),
    slice(None),
    slice(0, 0),
    slice(15, None, 2),
    torch.tensor([4, 4, 0]),
    torch.tensor(2),
    torch.arange(19, -1, -1),
    torch.arange(20) % 3 == 0,
    [5, 6],
    (slice(None), 0, 2),
    (0, 0),
    (3, slice(1, 3)),
    (torch.tensor([1, 2]), slice(None), 0),
    (torch.tensor([1, 2]), torch.tensor([0, 2])),
    ([1, 2], slice(None), [0, 3]),
    (torch.arange(20) < 3, torch.tensor([2, 0, 1])),
    (slice(2, 5), torch.tensor([0, 2])),
    (Ellipsis, 0),
    None,
    torch.zeros(2, 2, dtype=torch.int64),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_gives_the_images_of_the_tensor(images, stored, index) -> None:
    found, expected = stored[index], images[index]
    assert found.shape == expected.shape and torch.equal(found, expected)
    many = expected.ndim == 4 and expected.numel() > 5 * BYTES and not isinstance(index, tuple)
    assert isinstance(found, StoredImages) == many


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_views_of_views_and_replaced_images_are_those_of_a_tensor(data) -> None:
    tensor = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, *SHAPE).clone()
    stored: torch.Tensor = StoredImages([TensorRows(tensor.clone())])
    for step in range(data.draw(st.integers(1, 5))):
        count = len(tensor)
        rows = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12)))
        action = data.draw(st.sampled_from(["take", "replace", "append"]))
        if action == "take":
            tensor, stored = tensor[rows], StoredImages.__getitem__(stored, rows)
        elif action == "replace":
            rows = rows.unique()
            new = torch.full((len(rows), *SHAPE), 100 + step, dtype=torch.uint8)
            tensor, stored = replaced(tensor.clone(), rows, new), replaced(stored, rows, new)
        else:
            tensor, stored = torch.cat([tensor, tensor[rows]]), torch.cat([stored, stored[rows]])
        if not isinstance(stored, StoredImages):
            stored = StoredImages([TensorRows(stored)])
    assert torch.equal(stored.read(), tensor)


def test_what_needs_no_reading_is_that_of_the_tensor(images, stored) -> None:
    assert (stored.shape, stored.dtype, stored.ndim, len(stored)) == (images.shape, images.dtype, 4, 20)
    assert stored.is_contiguous() and stored.numel() == images.numel() and stored.device == images.device
    assert isinstance(stored, torch.Tensor) and "StoredImages((20, 3, 4, 4)" in repr(stored)
    assert stored.to("cpu").clone().contiguous().shape == images.shape


@pytest.mark.parametrize("size", [1, 3, 20, 50])
def test_parts(images, stored, size) -> None:
    parts, expected = stored.split(size), images.split(size)
    assert len(parts) == len(expected) and torch.equal(parts[-1], expected[-1])
    assert all(torch.equal(*pair) for pair in zip(parts, expected, strict=True))
    assert not any(isinstance(part, StoredImages) for part in parts)
    assert all(torch.equal(*pair) for pair in zip(stored, images, strict=True))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.float().mean(),
        lambda x: 255 - x,
        lambda x: x != x.flip(0),
        lambda x: x.flatten(1),
        lambda x: x.sum((1, 2, 3)),
        lambda x: x.to(torch.float32, memory_format=torch.channels_last),
        lambda x: torch.stack([x, x]),
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.cat([x, torch.full((1, *SHAPE), 0.5)]),
        lambda x: x.numpy()[3],
        lambda x: x.tolist()[3],
        lambda x: np.asarray(x)[4],
        lambda x: content_order(Split(x, torch.arange(20))),
    ],
)
def test_any_other_operation_reads_all_images(images, stored, operation) -> None:
    assert np.array_equal(operation(stored), operation(images))


def test_an_operation_on_more_images_than_there_is_memory_is_refused(stored, monkeypatch) -> None:
    monkeypatch.setattr(stored_images, "_free_memory", lambda: 100)
    with pytest.raises(
        ConfigError, match=r"needs all 20 of them at once, .* free; set dataset\.train_images"
    ):
        stored.float()
    assert stored[:2].float().shape == (2, *SHAPE) and len(list(stored.split(7))) == 3


def test_they_cannot_be_written_to(images, stored) -> None:
    for write in (lambda: stored.__setitem__(0, 1), lambda: stored.zero_(), lambda: stored.add_(1)):
        with pytest.raises(PluginError, match="cannot be written to"):
            write()
    assert torch.equal(stored.read(), images)


def test_changed_images_are_those_of_the_tensor_and_lie_in_a_file_without_a_name(
    images, stored, tmp_path
) -> None:
    def change(chunk: torch.Tensor, part: slice) -> torch.Tensor:
        return 1 - chunk * torch.arange(20)[part, None, None, None] / 20

    found = change_images(stored, change)
    assert isinstance(found, StoredImages) and torch.equal(found.read(), change_images(images, change))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_image_is_made_again_once_and_the_file_is_mended(images, tmp_path) -> None:
    sums = np.array([zlib.crc32(image.numpy().tobytes()) for image in images], np.uint32)
    asked: list[int] = []

    def repair(row: int) -> np.ndarray:
        asked.append(row)
        return images[row].numpy()

    stored = in_file(images, path := tmp_path / "images", checksums=sums, repair=repair)
    content = bytearray(path.read_bytes())
    content[7 + 4 * BYTES + 5] ^= 1
    path.write_bytes(content)
    assert torch.equal(stored.read(), images) and asked == [4]
    assert path.read_bytes()[7:] == images.numpy().tobytes()
    assert torch.equal(stored.read(), images) and asked == [4]
    content[7 + 9 * BYTES] ^= 1
    path.write_bytes(content)
    again = in_file(255 - images, tmp_path / "other", checksums=sums, repair=lambda row: images[0].numpy())
    with pytest.raises(DataError, match=r"other: image 9 is damaged, and its file is not the one it was"):
        again[9]


def test_a_damaged_image_in_a_file_that_cannot_be_written_is_repaired_at_every_reading(
    images, tmp_path
) -> None:
    sums = np.array([zlib.crc32(image.numpy().tobytes()) for image in images], np.uint32)
    stored = in_file(
        255 - images, path := tmp_path / "images", checksums=sums, repair=lambda row: images[row].numpy()
    )
    # The descriptor stays open, but the path can no longer be opened for writing.
    path.unlink()
    assert torch.equal(stored.read(), images)
    assert torch.equal(stored.read(), images)


def test_a_file_that_became_shorter_is_an_error_that_names_it(images, tmp_path) -> None:
    stored = in_file(images, path := tmp_path / "images")
    os.truncate(path, 7 + 10 * BYTES + 1)
    assert torch.equal(
        stored[:10].read() if isinstance(stored[:10], StoredImages) else stored[:10], images[:10]
    )
    with pytest.raises(DataError, match=r"images: became shorter while it was read"):
        stored[10]


@pytest.mark.parametrize(
    ("text", "size"), [("", 500e6), ("7", 7), ("1.5GB", 1.5e9), (" 20 mb ", 20e6), ("3KB", 3e3), ("2B", 2)]
)
def test_limits(monkeypatch, text, size) -> None:
    monkeypatch.setenv("BBMOE_MEMORY", text)
    assert memory_limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "1GiB", "MB", "1 2"])
def test_limits_that_are_none(monkeypatch, text) -> None:
    monkeypatch.setenv("BBMOE_MEMORY", text)
    with pytest.raises(ConfigError, match=r"\$BBMOE_MEMORY: expected a size such as 500MB or 20GB, got"):
        memory_limit()


def test_no_space_and_a_folder_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"these things need .* GB, and .* are free; set \$BBMOE_CACHE"):
        check_space(tmp_path, 10**18, "these things")
    (tmp_path / "file").touch()
    monkeypatch.setenv("BBMOE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        DataError, match=r"cannot be written \(Not a directory\); 10 changed images do not fit"
    ):
        Scratch(10, SHAPE)


def test_batches_are_loaded_in_order_ahead_and_their_errors_raised_when_due() -> None:
    loaded: list[int] = []

    def load(item: int) -> int:
        loaded.append(item)
        if item == 6:
            raise DataError("six")
        return item * item

    found = prefetched(load, range(10))
    assert next(found) == 0
    assert len(loaded) <= 5
    assert [next(found) for _ in range(5)] == [1, 4, 9, 16, 25]
    with pytest.raises(DataError, match="six"):
        next(found)
    assert max(loaded) < 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_a_gpu(images, stored) -> None:
    on_gpu = stored.to("cuda")
    assert on_gpu.device.type == "cuda" and on_gpu[3].device.type == "cuda"
    parts = torch.randperm(20).split(6)
    for part, batch in zip(parts, on_gpu.batches(parts), strict=True):
        assert batch.device.type == "cuda" and torch.equal(batch.cpu(), images[part])
