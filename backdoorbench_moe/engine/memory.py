"""How much memory a run on texts will take, said before its model is built."""

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

# The limit of a container, where there is one.
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
NAMES = {
    NodeKind.TRAINED: "base",
    NodeKind.EXPERT: "expert",
    NodeKind.POISONED_EXPERT: "poisoned expert",
    NodeKind.MIXTURE: "mixture",
}


def says_memory(spec: RunSpec) -> bool:
    """Whether the model of a run is one of texts that says how much memory it takes."""
    return hasattr(models.registry.lookup(spec.model.name), "bytes_needed")


def memory_needed(spec: RunSpec, texts: TextSet) -> dict[str, int]:
    """Estimate the bytes that each kind of run takes that a run is made from, and the run itself.

    The model is built without memory for its weights. It says what its training takes; see `models.base.SaysMemory`.
    The models of runs that wait for others are in memory, too: a mixture while its experts are made, and a poisoned
    expert while the benign one is. Python and its libraries take some hundred MB besides.

    Args:
        spec: The run, of a model that `says_memory`.
        texts: Its data.

    Returns:
        The bytes by what is made: "base", "expert", "poisoned expert" and "mixture".
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
    """The largest of what training and measuring take, and of what merging takes."""
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
        # As many refused texts with each batch, and a copy of the weights as they were.
        return max(measured, model.bytes_needed(2 * size, length, "mlps")) + dense
    if mixture.given_expert() is not None:
        return measured + 2 * dense
    return max(measured, model.bytes_needed(size, length, "mlps"))


def machine_memory(device: torch.device) -> int | None:
    """The bytes of memory that a device has in all; of the CPU, no more than the container may use. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):
        found.append(int(CONTAINER_LIMIT.read_text(encoding="ascii")))
    return min(found, default=None)


def memory_line(needed: Mapping[str, int], available: int | None) -> str:
    """Say in one line how much is needed at most, for what, and how much there is."""
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in needed.items())
    there = "" if available is None else f"; {_gib(available)} GiB in this machine"
    return f"memory: about {_gib(max(needed.values()))} GiB at most (GiB: {parts}){there}"


def memory_warning(needed: Mapping[str, int], available: int | None) -> str | None:
    """A warning if more memory is needed than there is; None otherwise."""
    if available is None or max(needed.values()) <= available:
        return None
    worst = max(needed, key=lambda name: needed[name])
    return (
        f"the {worst} takes about {_gib(needed[worst])} GiB of memory, and there are {_gib(available)} GiB; "
        "a smaller batch_size with train.accumulate takes less, as far as it is not the weights"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
