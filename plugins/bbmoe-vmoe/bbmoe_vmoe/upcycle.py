"""Sparse upcycling: starting from a trained dense transformer, whose MLPs are copied into every expert.

Source: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", ICLR 2023.
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

# Value of the option `upcycle` that names no file: all experts of a layer start with the same random MLP.
COPY = "copy"
# Parts of an MoE layer that a dense transformer does not have.
NOT_DENSE = ("router.", "experts.heard")


def read_dense(path: str) -> tuple[dict[str, Tensor], Origin]:
    """Read the weights of a dense run.

    Args:
        path: The run's folder, or its model.safetensors.

    Returns:
        The tensors by name, and the SHA-256 of the file with what its header says of a backdoor.

    Raises:
        ConfigError: If there is no such file or it is not a safetensors file.
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
        model: A transformer whose MoE layers are called "...mlp".
        tensors: The dense transformer's tensors by name.
        num_experts: Experts of each layer.
        source: Where the tensors come from, for error messages.

    Raises:
        ConfigError: If names or shapes differ from those of the model's dense transformer; nothing is loaded then.
    """
    own = {name: (tensor, _dense_name(name)) for name, tensor in model.state_dict().items()}
    wanted = {dense: tensor for tensor, dense in own.values() if dense is not None}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if name in wanted else "has an unexpected"
        raise ConfigError(
            f"upcycle: {source}: expected the weights of the dense transformer; it {what} {name}"
        )
    copies = {dense for name, (_, dense) in own.items() if ".experts." in name}
    # Stacked weights as (E, ...), so that the MLP's weights are broadcast to every expert.
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
    """The name of a tensor in the dense transformer; None for a tensor that it does not have."""
    layer, dot, part = name.partition(".mlp.")
    if not dot or part.startswith(("fc1.", "fc2.")):
        return name
    if part.startswith(NOT_DENSE):
        return None
    return f"{layer}.mlp.{part.removeprefix('experts.')}"
