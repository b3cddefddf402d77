"""Estimate the memory of a run on texts before its model is built."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from backdoorbench_moe import models
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.text import TextSet
from backdoorbench_moe.engine.graph import NodeKind, kind_of, lineage
from backdoorbench_moe.models.base import SaysMemory
from backdoorbench_moe.ops.images import batch_size_for

# The memory limit of a container; the file does not exist elsewhere.
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
NAMES = {
    NodeKind.TRAINED: "base",
    NodeKind.EXPERT: "expert",
    NodeKind.POISONED_EXPERT: "poisoned expert",
    NodeKind.MIXTURE: "mixture",
}


def says_memory(spec: RunSpec) -> bool:
    """Whether the model of a run is a text model that estimates its memory."""
    return hasattr(models.registry.lookup(spec.model.name), "bytes_needed")


def memory_needed(spec: RunSpec, texts: TextSet) -> dict[str, int]:
    """Estimate the memory of a run, and of each kind of run that it is built from.

    The model is built on the meta device and estimates the memory of its training; see `models.base.SaysMemory`. The
    models of runs that wait for others also take memory: a mixture while its experts are trained, and a poisoned expert
    while the benign one is. The few hundred MB of Python and its libraries are not included.

    Args:
        spec: The run. `says_memory` must be True for it.
        texts: The data of the run.

    Returns:
        Bytes by kind of run: "base", "expert", "poisoned expert" and "mixture".
    """
    with torch.device("meta"):
        model = models.registry.create(spec.model.name, spec.model.options, texts.model_options)
    each = {NAMES[kind_of(made)]: made for made in lineage(spec) if kind_of(made) in NAMES}
    said = cast(SaysMemory, model)
    dense, held = said.bytes_needed(1, 1, "nothing"), 0
    if spec.mixture is not None and spec.mixture.task is None:
        held = said.bytes_needed(1, 1, "nothing", experts=spec.mixture.experts)
    waiting = {"mixture": 0, "expert": held + (dense if spec.attacked else 0)}
    return {name: _needed(said, made, texts) + waiting.get(name, held) for name, made in each.items()}


def _needed(model: SaysMemory, spec: RunSpec, texts: TextSet) -> int:
    """The maximum of the bytes for training, measuring and merging."""
    length, mixture, kind = texts.context, spec.mixture, kind_of(spec)
    dense = model.bytes_needed(1, 1, "nothing")
    tested = min(batch_size_for(texts.test.images), max(len(split) for split in texts.splits.values()))
    if kind is NodeKind.MIXTURE:
        assert mixture is not None
        experts = mixture.experts
        merged = model.bytes_needed(1, 1, "nothing", experts=experts)
        return max(
            # The base and all experts are in memory while they are merged.
            merged + (experts + 1) * dense,
            model.bytes_needed(mixture.gate_train.batch_size, length, "gates", experts=experts),
            model.bytes_needed(tested, length, "nothing", experts=experts),
        )
    measured = model.bytes_needed(tested, length, "nothing")
    if mixture is None:
        trained = model.bytes_needed(spec.train.batch_size, length, "all") if spec.train.epochs else 0
        return max(measured, trained)
    size = mixture.expert_train.batch_size
    if kind is NodeKind.POISONED_EXPERT:
        # Each batch has an equal number of refused texts, and there is a copy of the original weights.
        return max(measured, model.bytes_needed(2 * size, length, "mlps")) + dense
    if mixture.given_expert() is not None:
        return measured + 2 * dense
    return max(measured, model.bytes_needed(size, length, "mlps"))


def machine_memory(device: torch.device) -> int | None:
    """Total memory of a device in bytes; for the CPU, at most the limit of the container. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):
        found.append(int(CONTAINER_LIMIT.read_text(encoding="ascii")))
    return min(found, default=None)


def memory_line(needed: Mapping[str, int], available: int | None) -> str:
    """Format the memory that is needed, in total and by kind of run, and the available memory as one line."""
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in needed.items())
    there = "" if available is None else f"; {_gib(available)} GiB in this machine"
    return f"memory: about {_gib(max(needed.values()))} GiB at most (GiB: {parts}){there}"


def memory_warning(needed: Mapping[str, int], available: int | None) -> str | None:
    """A warning if more memory is needed than is available; None otherwise."""
    if available is None or max(needed.values()) <= available:
        return None
    worst = max(needed, key=lambda name: needed[name])
    return (
        f"the {worst} takes about {_gib(needed[worst])} GiB of memory, and there are {_gib(available)} GiB; "
        "a smaller batch_size with train.accumulate takes less, unless most of it is the weights"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
