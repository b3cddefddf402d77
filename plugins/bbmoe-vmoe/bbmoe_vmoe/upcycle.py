"""Sparse upcycling: initialising experts with copies of the MLPs of a trained dense transformer.

Source:
    Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", ICLR 2023.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.base import Origin
from backdoorbench_moe.paths import expand

# Value of the option `upcycle` with which all experts of a layer are initialised with the same random MLP.
COPY = "copy"
# Prefixes of the tensors of an MoE layer that a dense transformer does not have.
NOT_DENSE = ("router.", "experts.heard")


def read_dense(path: str) -> tuple[dict[str, Tensor], Origin]:
    """Read the weights of a dense run.

    Args:
        path: The run's folder, or its model.safetensors.

    Returns:
        The tensors by name, and the origin of the weights.

    Raises:
        ConfigError: There is no such file, or it is not a safetensors file.
    """
    file = expand(path, "upcycle")
    file = file / "model.safetensors" if file.is_dir() else file
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(file, "pt") as opened:
            said = (opened.metadata() or {}).get("backdoored", "")
        return load_file(file), Origin(digest, said if said in ("true", "false") else "unknown")
    except OSError as error:
        raise ConfigError(f"upcycle: {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"upcycle: {file}: expected a file of safetensors ({error})") from error


@torch.no_grad()
def load_dense(model: nn.Module, tensors: dict[str, Tensor], *, num_experts: int, source: str) -> None:
    """Load the weights of a dense transformer into a model with MoE layers, in place. Routers keep their weights.

    Args:
        model: A transformer whose MoE layers have names that end in "mlp".
        tensors: The tensors of the dense transformer by name.
        num_experts: Experts of each layer.
        source: Source of the tensors, for error messages.

    Raises:
        ConfigError: Names or shapes differ from those of the dense transformer of the model; nothing is loaded.
    """
    own = {name: (tensor, _dense_name(name)) for name, tensor in model.state_dict().items()}
    wanted = {dense: tensor for tensor, dense in own.values() if dense is not None}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if name in wanted else "has an unexpected"
        raise ConfigError(
            f"upcycle: {source}: expected the weights of the dense transformer; it {what} {name}"
        )
    copies = {dense for name, (_, dense) in own.items() if ".experts." in name}
    # Stacked weights as (E, ...), so that the weights of the MLP are broadcast to all experts.
    wanted = {
        name: tensor.unflatten(0, (num_experts, -1)) if name in copies else tensor
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
    """Return the name of a tensor in the dense transformer, or None for a tensor that it does not have."""
    layer, dot, part = name.partition(".mlp.")
    if not dot or part.startswith(("fc1.", "fc2.")):
        return name
    if part.startswith(NOT_DENSE):
        return None
    return f"{layer}.mlp.{part.removeprefix('experts.')}"
