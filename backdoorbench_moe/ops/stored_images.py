"""A tensor of images that may exceed the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.ops.image_rows import Rows, Scratch, TensorRows, gigabytes, memory_limit
from backdoorbench_moe.ops.prefetch import moved, prefetched


class StoredImages(Tensor):
    """Images (N, C, H, W) uint8 that are stored in files and used like a tensor.

    Shape, type and device are those of the tensor it represents. Images are read on demand:

    - Indexing along the first axis (with a number, slice, mask or index tensor) returns a tensor, or stored images if
      the result is larger than `memory_limit`.
    - `split` returns tensors, and reads the next ones in threads while the current one is used.
    - `to` another device reads nothing: images are moved when they are read.
    - `torch.cat` and `replaced` combine stored images and tensors; no image is copied.
    - Any other operation reads all images, or is refused if they do not fit into memory.

    Stored images are read-only.

    Args:
        sources: Where the images are stored.
        rows: (N,) int64 on the CPU: the index of each image in the concatenated sources.
        device: The device of the tensors that are read.
    """

    sources: tuple[Rows, ...]
    rows: Tensor

    @staticmethod
    def __new__(
        cls, sources: Sequence[Rows], rows: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> StoredImages:
        if rows is None:
            rows = torch.arange(sum(map(len, sources)))
        shape = (len(rows), *sources[0].shape)
        stored: StoredImages = Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.uint8, device=torch.device(device)
        )
        stored.sources, stored.rows = tuple(sources), rows
        return stored

    # ---- reading ---------------------------------------------------------------------------------------
    def read(self, places: Tensor | None = None) -> Tensor:
        """Read the images at some places (n,) int64, or all images, as a tensor (n, C, H, W) on the device."""
        return self._read(self.rows if places is None else self.rows[places.cpu()]).to(self.device)

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of batches, read ahead in threads.

        Args:
            parts: The places (B,) int64 of the images of each batch, on the CPU.

        Yields:
            (B, C, H, W) uint8 on the device.
        """
        read = prefetched(self._read, (self.rows[part] for part in parts))
        return read if self.device.type == "cpu" else moved(read, self.device)

    def _read(self, rows: Tensor) -> Tensor:
        """Read the images in some rows of the sources, (n, C, H, W) on the CPU."""
        wanted = rows.numpy()
        out = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        first = 0
        for source in self.sources:
            inside = (wanted >= first) & (wanted < first + len(source))
            if inside.all():
                source.read(wanted - first, out)
                break
            if inside.any():
                part = np.empty((int(inside.sum()), *self.shape[1:]), np.uint8)
                source.read(wanted[inside] - first, part)
                out[inside] = part
            first += len(source)
        return torch.from_numpy(out)

    def __getitem__(self, index: Any) -> Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if first is None or first is Ellipsis:
            return self._whole()[index]
        rows = self.rows[first.cpu() if isinstance(first, Tensor) else first]
        if rows.ndim == 0:
            return self._read(rows[None])[0].to(self.device)[rest]
        if rows.ndim > 1:
            return self._whole()[index]
        chosen = StoredImages(self.sources, rows, self.device)
        if rest or chosen.numel() <= memory_limit():
            chosen._check_memory()
            found = chosen.read()
            # Indices along several axes are paired, as in any tensor; a slice is not paired.
            own = slice(None) if isinstance(first, slice) else torch.arange(len(rows))
            return found[own, *rest] if rest else found
        return chosen

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the images one by one."""
        for batch in self.split(max(1, 10**6 // max(1, self[:1].numel()))):
            yield from batch

    def split(self, split_size: Any, dim: int = 0) -> Any:
        """Return the images in parts of this size, as a sequence of tensors that are read on demand."""
        if not isinstance(split_size, int) or dim:
            return self._whole().split(split_size, dim)
        return Parts(self, split_size)

    # ---- what needs no reading -------------------------------------------------------------------------
    def replaced(self, places: Tensor, images: Tensor) -> StoredImages:
        """Return stored images in which the images at some places are replaced.

        Args:
            places: (n,) int64.
            images: (n, C, H, W) uint8, a tensor or stored images. They are not copied, and must not be written to
                afterwards.
        """
        joined, rows = concatenated([self, images]), self.rows.clone()
        rows[places.cpu()] = joined.rows[len(self) :]
        return StoredImages(joined.sources, rows, self.device)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the same images for another device; for another type or layout, all images are read."""
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if dtype in (None, torch.uint8) and layout in (None, torch.contiguous_format):
            return StoredImages(self.sources, self.rows, self.device if device is None else device)
        return self._whole().to(*args, **kwargs)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """Return the same images for the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = None, *_: Any, **__: Any) -> Tensor:
        """Return the same images for a GPU."""
        return self.to("cuda" if device is None else device)

    def clone(self, *_: Any, **__: Any) -> StoredImages:
        """Return the same images, which are read-only."""
        return self

    def contiguous(self, *_: Any, **__: Any) -> StoredImages:
        """Return the same images."""
        return self

    def detach(self) -> StoredImages:
        """Return the same images."""
        return self

    def __deepcopy__(self, _: Any) -> StoredImages:
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredImages({tuple(self.shape)}, device={str(self.device)!r})"

    def __setitem__(self, *_: Any) -> None:
        raise PluginError(
            "images: those of a data set that is larger than memory cannot be written to; write to a copy of some"
        )

    # ---- everything else -------------------------------------------------------------------------------
    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.cat, torch.concat, torch.concatenate):
            parts, dim = _of_cat(*args, **(kwargs or {}))
            if dim == 0 and {(part.shape[1:], part.dtype) for part in parts} == {
                (parts[0].shape[1:], torch.uint8)
            }:
                joined = concatenated(parts)
                return joined if joined.numel() > memory_limit() else joined.read()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply an operation to all images, if they fit into memory."""
        if func._schema.is_mutable and isinstance(args[0], StoredImages):
            args[0].__setitem__()
        read = torch.utils._pytree.tree_map_only(StoredImages, StoredImages._whole, (args, kwargs or {}))
        return func(*read[0], **read[1])

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Return all images as an array, if they fit into memory."""
        return self._whole().numpy()

    def tolist(self) -> Any:
        """Return the values of all images as lists, if they fit into memory."""
        return self._whole().tolist()

    def _whole(self) -> Tensor:
        self._check_memory()
        return self.read()

    def _check_memory(self) -> None:
        size, free = self.numel(), _free_memory()
        if size > memory_limit() and free is not None and size > free:
            raise ConfigError(
                f"images: this needs all {len(self):,} of them at once, which are {gigabytes(size)}, and "
                f"{gigabytes(free)} of memory are free; set dataset.train_images or dataset.test_images to fewer"
            )


class Parts(Sequence[Tensor]):
    """Stored images in parts of the same size; only the last may be smaller.

    Args:
        images: The images.
        size: Number of images in a part.
    """

    def __init__(self, images: StoredImages, size: int) -> None:
        self._images = images
        self._parts = torch.arange(len(images)).split(size)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        return self._images.read(self._parts[index])

    def __iter__(self) -> Iterator[Tensor]:
        return self._images.batches(self._parts)


def concatenated(parts: Sequence[Tensor]) -> StoredImages:
    """Return the images of tensors and stored images, one after the other, as stored images on the first's device."""
    sources: list[Rows] = []
    rows = []
    for part in parts:
        if not isinstance(part, StoredImages):
            part = StoredImages([TensorRows(part)])
        starts = torch.tensor([0, *(len(source) for source in part.sources)]).cumsum(0)
        known = []
        for source in part.sources:
            if not any(source is other for other in sources):
                sources.append(source)
            place = next(n for n, other in enumerate(sources) if other is source)
            known.append(sum(len(other) for other in sources[:place]))
        which = torch.searchsorted(starts, part.rows, right=True) - 1
        rows.append(part.rows - starts[which] + torch.tensor(known)[which])
    return StoredImages(sources, torch.cat(rows), parts[0].device)


def replaced(images: Tensor, places: Tensor, others: Tensor) -> Tensor:
    """Return images with those at some places (n,) int64 replaced; tensors are changed in place, stored images not."""
    if isinstance(images, StoredImages):
        return images.replaced(places, others)
    images[places] = others
    return images


def empty_like(images: Tensor) -> Tensor | Scratch:
    """Return storage for as many images: a tensor on their device, or a temporary file above the memory limit."""
    if not isinstance(images, StoredImages):
        return torch.empty_like(images)
    if images.numel() <= memory_limit():
        return torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    return Scratch(len(images), tuple(images.shape[1:]))


def _of_cat(tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> tuple[Sequence[Tensor], int]:
    return tensors, dim


def _free_memory() -> int | None:
    """Return the available memory in bytes, as Linux reports it; None if it is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
