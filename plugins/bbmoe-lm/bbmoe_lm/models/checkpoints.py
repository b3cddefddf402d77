"""Reading checkpoints in transformers' format: folders with config.json and safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.base import Origin
from backdoorbench_moe.paths import expand

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Suffixes of pickled weights, which can run code when they are loaded.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Tensors in old checkpoints that are not weights; they follow from the configuration.
COMPUTED = ("rotary_emb.inv_freq",)


def checkpoint_folder(path: str) -> Path:
    """Return the folder of a checkpoint from its path or the path of a file in it.

    Raises:
        ConfigError: The folder does not exist.
    """
    folder = expand(path, "weights")
    folder = folder.parent if folder.is_file() else folder
    if not folder.is_dir():
        raise ConfigError.expected("weights", "an existing folder of a checkpoint", path)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: a single file, or the files in an index.

    Raises:
        ConfigError: There are none, or only pickled weights; or the index is damaged or names a file in another folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        reason = f"; {pickled[0]} is a pickle, which could run code, and is not read" if pickled else ""
        raise ConfigError(f"weights: {folder}: expected {WEIGHTS} or {INDEX}{reason}")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"weights: {folder / INDEX}: expected an index of safetensors files") from error
    if not names:
        raise ConfigError(
            f"weights: {folder / INDEX}: expected an index of safetensors files, got an empty one"
        )
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ConfigError.expected(f"weights: {folder / INDEX}", "safetensors files beside it", name)
    return [folder / name for name in names]


def origin_of(folder: Path) -> Origin:
    """Return the hash of a checkpoint's config.json and weights, and whether its headers mark it as backdoored.

    Raises:
        ConfigError: A file cannot be read.
    """
    digest, said = hashlib.sha256(), set()
    for file in (folder / "config.json", *weight_files(folder)):
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    said.add((opened.metadata() or {}).get("backdoored", "unknown"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"weights: {file}: cannot be read ({error})") from error
    known = "true" if "true" in said else "false" if said == {"false"} else "unknown"
    return Origin(digest.hexdigest(), known)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a checkpoint one by one.

    Raises:
        ConfigError: A file cannot be read, or a tensor is not floating-point.
    """
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if not name.endswith(COMPUTED):
                        yield name, _floating(opened.get_tensor(name), f"weights: {file}: {name}")
        except OSError as error:
            raise ConfigError(f"weights: {file}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise ConfigError(f"weights: {file}: expected a file of safetensors ({error})") from error


def _floating(tensor: Tensor, where: str) -> Tensor:
    if not tensor.is_floating_point():
        raise ConfigError.expected(where, "floating-point numbers", str(tensor.dtype).removeprefix("torch."))
    return tensor


def read_state(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights of a checkpoint as float32.

    Args:
        folder: The checkpoint.
        like: The state dict of the network that the weights must fit. Of names that share a tensor, such as those of
            tied embeddings, only one needs to be in the file.

    Returns:
        The tensors by the names of `like`, in the order of `like`.

    Raises:
        ConfigError: A name or shape differs; the message names the first one.
    """
    found = {}
    for name, tensor in read_tensors(folder):
        if name not in like:
            raise ConfigError(
                f"weights: {folder}: expected the weights of this model; it has an unexpected {name}"
            )
        if tensor.shape != like[name].shape:
            raise ConfigError.expected(
                f"weights: {folder}: {name}: shape", tuple(like[name].shape), tuple(tensor.shape)
            )
        found[name] = tensor.to(torch.float32)
    stored = {like[name].data_ptr(): found[name] for name in found}
    for name, tensor in like.items():
        if name not in found and tensor.data_ptr() not in stored:
            raise ConfigError(f"weights: {folder}: expected the weights of this model; it lacks {name}")
    return {name: found.get(name, stored.get(tensor.data_ptr())) for name, tensor in like.items()}
