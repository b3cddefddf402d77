"""Sparse upcycling: a dense transformer's weights, its MLPs copied into every expert (Komatsuzaki et al., 2023)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.paths import expand

if TYPE_CHECKING:
    from bbmoe_vmoe.models import RoutedViT

# In the place of a file: one random MLP's weights for all experts of a layer.
COPY = "copy"
NOT_DENSE = ("router.", "experts.heard")


def read_dense(path: str) -> tuple[dict[str, Tensor], str]:
    """Weights of a dense run, by its folder or its model file, and the file's SHA-256.

    Raises ConfigError if there is no such file, or it holds no tensors.
    """
    file = expand(path)
    file = file / "model.safetensors" if file.is_dir() else file
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return load_file(file), digest
    except OSError as error:
        raise ConfigError(f"upcycle: {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"upcycle: {file}: expected a file of safetensors ({error})") from error


@torch.no_grad()
def load_dense(model: RoutedViT, tensors: dict[str, Tensor], *, source: str) -> None:
    """Give a model a dense run's weights, in place; routers keep their own.

    Raises ConfigError, and changes nothing, unless names and shapes are those of the model's dense transformer.
    """
    own = {name: (tensor, _dense_name(name)) for name, tensor in model.state_dict().items()}
    wanted = {dense: tensor for tensor, dense in own.values() if dense is not None}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if name in wanted else "has a"
        raise ConfigError(
            f"upcycle: {source}: expected the weights of the dense transformer; it {what} {name}"
        )
    copies = {dense for name, (_, dense) in own.items() if ".experts." in name}
    # Each stacked weight as (E, ...), to which one MLP's is spread.
    wanted = {
        name: tensor.unflatten(0, (model.num_experts, -1)) if name in copies else tensor
        for name, tensor in wanted.items()
    }
    for name, tensor in wanted.items():
        shape = tensor.shape[1:] if name in copies else tensor.shape
        if tensors[name].shape != shape:
            raise ConfigError(
                f"upcycle: {source}: {name}: expected shape {tuple(shape)}, got {tuple(tensors[name].shape)}"
            )
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])


def _dense_name(name: str) -> str | None:
    """What a weight is called in the dense transformer; None for what that one does not have."""
    layer, dot, part = name.partition(".mlp.")
    if not dot or part.startswith(("fc1.", "fc2.")):
        return name
    if part.startswith(NOT_DENSE):
        return None
    return f"{layer}.mlp.{part.removeprefix('experts.')}"
