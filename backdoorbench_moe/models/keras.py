"""Conversion of the Keras model of the pMoE reference to `PMoE`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.models.pmoe import PMoE


@dataclass(frozen=True)
class Slot:
    """One array in the list of Keras weights.

    Attributes:
        name: Description of the array, such as "block1.conv1 kernel".
        ours: View of the corresponding tensor in `PMoE`, in Keras's layout. Writing to it changes the model.
    """

    name: str
    ours: Tensor


def pmoe_from_keras(weights: Sequence[Any], *, image_size: int = 32, top_k: int = 16) -> PMoE:
    """Build a `PMoE` from the weights of the reference's Keras model.

    Outputs, routing and SGD steps equal those of the reference. In training, the moving variance is updated with the
    unbiased variance of the batch, as in the fused batch norm of TensorFlow in Keras 2 (Keras 3 uses the biased one).

    Args:
        weights: The output of `model.get_weights()`: 42 + 7 * E arrays for E experts (70 for 4) in the order of the
            reference, with kernels as HWIO and batch norms as gamma, beta, moving mean, moving variance.
        image_size: Side of the images in pixels. Like `top_k`, it cannot be derived from the weights.
        top_k: Number of patches that each expert selects.

    Returns:
        The model, in training mode.

    Raises:
        ShapeError: An array has the wrong shape or type; the message names its index.
        ConfigError: `image_size` or `top_k` is out of range.

    Source:
        nowazrabbani/pMoE_CNN, `wideresnet_moe.py`.
    """
    arrays = [_as_array(index, weight) for index, weight in enumerate(weights)]
    sizes = _read_sizes(arrays)
    # The random initial weights are overwritten, so the state of the caller's generator is preserved.
    with torch.random.fork_rng(devices=[]):
        model = PMoE(image_size=image_size, top_k=top_k, **sizes)
    for index, (array, slot) in enumerate(zip(arrays, keras_slots(model), strict=True)):
        shape = tuple(slot.ours.shape)
        if array.shape != shape:
            raise ShapeError(f"weights[{index}], {slot.name}: expected shape {shape}, got {array.shape}")
        slot.ours.copy_(torch.from_numpy(array))
    return model


def _as_array(index: int, weight: Any) -> np.ndarray:
    try:
        array = np.asarray(weight)
    except ValueError as error:  # Nested lists of different lengths.
        raise ShapeError(f"weights[{index}]: expected an array, got lists of different lengths") from error
    with np.errstate(over="ignore"):
        values = array.astype(np.float32) if array.dtype.kind in "fiu" else None
    if values is None or not np.isfinite(values).all():
        raise ShapeError(f"weights[{index}]: expected an array of finite float32 numbers, got {array.dtype}")
    return values


def _read_sizes(arrays: list[np.ndarray]) -> dict[str, int]:
    """Derive the options of `PMoE` from the shapes of the arrays."""
    experts, rest = divmod(len(arrays) - 42, 7)
    if experts < 1 or rest:
        raise ShapeError(f"weights: expected 70 arrays (42 + 7 for each expert), got {len(arrays)}")

    def last_axis(index: int, name: str, axes: int) -> int:
        shape = arrays[index].shape
        if len(shape) != axes or 0 in shape:
            raise ShapeError(f"weights[{index}], {name}: expected {axes} axes, none empty, got shape {shape}")
        return shape[-1]

    wide = last_axis(6, "block1.conv1 kernel", 4)
    if wide % 16:
        raise ShapeError(f"weights[6], block1.conv1 kernel: expected a multiple of 16 channels, got {wide}")
    return {
        "widen_factor": wide // 16,
        "moe_channels": last_axis(34, "reduce kernel", 4),
        "num_experts": experts,
        "expert_channels": last_axis(36 + 5 * experts, "moe.conv kernel of expert 0", 4),
        "num_classes": last_axis(len(arrays) - 1, "head bias", 1),
    }


def keras_slots(model: PMoE) -> Iterator[Slot]:
    """Yield the arrays in the order of the reference's `get_weights()`, with the corresponding tensors of `model`."""
    trunk, moe = model.trunk, model.moe
    yield from _conv("stem", trunk.stem)
    for name, block in (("block1", trunk.block1), ("block2", trunk.block2)):
        yield from _norm(f"{name}.norm1", block.norm1)
        yield from _conv(f"{name}.conv1", block.conv1)
        yield from _norm(f"{name}.norm2", block.norm2)
        yield from _conv(f"{name}.shortcut", block.shortcut)
        yield from _conv(f"{name}.conv2", block.conv2)
    yield from _norm("reduce_norm", model.reduce_norm)
    yield from _conv("reduce", model.reduce)
    experts, channels = moe.router.weight.shape
    outputs = moe.conv.out_channels // experts
    for expert, weight in enumerate(moe.router.weight.detach()):
        yield Slot(f"gate kernel of expert {expert}", weight.view(1, 1, channels, 1))
    for expert in range(experts):
        part = slice(expert * channels, (expert + 1) * channels)
        yield from _norm(f"moe.norm of expert {expert}", moe.norm, part)
    for expert in range(experts):
        part = slice(expert * outputs, (expert + 1) * outputs)
        yield from _conv(f"moe.conv of expert {expert}", moe.conv, part)
    yield from _norm("norm", model.norm)
    yield Slot("head kernel", model.head.weight.detach().t())
    yield Slot("head bias", model.head.bias.detach())


def _conv(name: str, conv: nn.Conv2d, part: slice = slice(None)) -> Iterator[Slot]:
    assert conv.bias is not None
    yield Slot(f"{name} kernel", conv.weight.detach()[part].permute(2, 3, 1, 0))  # OIHW seen as HWIO
    yield Slot(f"{name} bias", conv.bias.detach()[part])


def _norm(name: str, norm: nn.BatchNorm2d, part: slice = slice(None)) -> Iterator[Slot]:
    named = {"gamma": norm.weight, "beta": norm.bias, "mean": norm.running_mean, "variance": norm.running_var}
    for array, tensor in named.items():
        assert tensor is not None
        yield Slot(f"{name} {array}", tensor.detach()[part])
