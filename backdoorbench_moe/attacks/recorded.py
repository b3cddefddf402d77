"""An attack that was run with another tool, with its poisoned training images in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.options import FilePath
from backdoorbench_moe.paths import expand

GROUPS = ("indices", "labels", "cover", "noise")


class Recorded(Attack):
    """Change the training images that are listed in a file, as another tool did.

    `bbmoe import backdoorbench` writes the file. With the trigger `stored`, which contains the images, this attack
    reproduces any attack of BackdoorBench, and any model can be trained on its poisoned training set.

    Args:
        poison: Target class and mapping. The rates describe the file; they do not choose images.
        file: File with the training images of each group and their labels. None if they are unknown: then no training
            image is changed, and defenses that need the training set are refused.

    Raises:
        ConfigError: The file is missing or has the wrong format.
    """

    implies: ClassVar[Mapping[str, Any]] = {"trigger": "stored", "applicator": "image"}
    deviations: ClassVar[Mapping[str, str]] = {
        "test_settings_are_followed_or_refused": "the file says which images are changed, and how"
    }

    def __init__(self, *, poison: PoisonSpec, file: FilePath | None = None) -> None:
        super().__init__(poison=poison)
        self.file = file

    def plan(self, labels: Tensor, num_classes: int, seed: int) -> PoisonPlan:
        """Return the images in the file; the seed is not used.

        Raises:
            ConfigError: The file is missing or damaged, or names images that the training set does not have.
        """
        if self.file is None:
            nothing = torch.empty(0, dtype=torch.int64)
            return PoisonPlan(nothing, nothing)
        groups = read_plan(expand(self.file, "attack.file"))
        changed = torch.cat([groups[name] for name in GROUPS if name != "labels"])
        if len(outside := changed[(changed < 0) | (changed >= len(labels))]):
            raise ConfigError.expected("attack.file", f"places in 0..{len(labels) - 1}", int(outside[0]))
        return PoisonPlan(**groups)


def write_plan(path: Path, plan: PoisonPlan) -> None:
    """Write the file of a `Recorded` attack."""
    from safetensors.torch import save_file

    tensors = {"labels": plan.labels, **plan.groups}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_plan(path: Path) -> dict[str, Tensor]:
    """Read a file of `write_plan`. Raise ConfigError if it is missing or has the wrong format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        groups = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"attack.file: {path}: expected recorded poison (safetensors): {error}") from None
    if groups.keys() != set(GROUPS) or any(g.ndim != 1 or g.dtype != torch.int64 for g in groups.values()):
        raise ConfigError(f"attack.file: {path}: expected the tensors {', '.join(GROUPS)}, each (n,) int64")
    return groups
