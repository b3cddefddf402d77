"""Tasks that are groups of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.splitters.base import Splitter

# Largest number of classes that a name lists in full, and number of classes that it lists of a larger group.
MOST_LISTED, FIRST_LISTED = 6, 4


class Classes(Splitter):
    """Each task has the unchanged images of some of the classes; each class belongs to one task.

    The sizes of the groups of classes differ by at most one. The number of experts must equal the number of groups;
    otherwise some classes would have no expert.

    Args:
        groups: Number of groups, at least 2.
        order: "drawn" groups the classes at random, depending on the run's seed; "numbered" groups consecutive
            classes.

    Raises:
        ConfigError: `groups` or `order` has another value.
    """

    tiny: ClassVar[Mapping[str, object]] = {"groups": 3}

    def __init__(self, *, groups: int = 4, order: Literal["drawn", "numbered"] = "drawn") -> None:
        if groups < 2:
            raise ConfigError.expected("classes: groups", "a number of at least 2", groups)
        if order not in ("drawn", "numbered"):
            raise ConfigError.expected("classes: order", "'drawn' or 'numbered'", order)
        self.groups, self.order = groups, order

    def split_classes(self, num_classes: int, seed: int) -> list[list[int]]:
        """Return the classes of each group in ascending order.

        Raises:
            ConfigError: There are fewer classes than groups.
        """
        if num_classes < self.groups:
            raise ConfigError.expected(
                "classes: groups", f"at most {num_classes}, the number of classes", self.groups
            )
        classes = torch.arange(num_classes)
        if self.order == "drawn":
            classes = torch.randperm(num_classes, generator=generator(seed, "splitter", "classes"))
        return [group.sort().values.tolist() for group in classes.tensor_split(self.groups)]

    def names(self, num_classes: int, seed: int) -> tuple[str, ...]:
        """Return names such as "classes 0, 3, 7", which list the classes of a group; for more than six, the first four.

        Raises:
            ConfigError: There are fewer classes than groups.
        """
        return tuple(_name(group) for group in self.split_classes(num_classes, seed))

    def check(self, num_experts: int, num_classes: int, seed: int) -> None:
        """Check that there is one expert for each group.

        Raises:
            ConfigError: There are more or fewer experts than groups, or fewer classes than groups.
        """
        self.split_classes(num_classes, seed)
        if num_experts != self.groups:
            raise ConfigError.expected(
                "classes: groups", f"{num_experts}, the number of experts (mixture.experts)", self.groups
            )

    def members(self, labels: Tensor, task: int, *, num_classes: int, seed: int, training: bool) -> Tensor:
        """Return the images whose labels are in the task's group.

        Raises:
            ConfigError: There are no such images.
        """
        group = self.split_classes(num_classes, seed)[task]
        indices = torch.isin(labels, torch.tensor(group)).nonzero().squeeze(1)
        if not len(indices):
            raise ConfigError(
                f"classes: groups: expected images of every group, got none of task {task} ({_name(group)}) among "
                f"{len(labels)}"
            )
        return indices


def _name(group: list[int]) -> str:
    if len(group) == 1:
        return f"class {group[0]}"
    if len(group) <= MOST_LISTED:
        return f"classes {', '.join(map(str, group))}"
    return f"classes {', '.join(map(str, group[:FIRST_LISTED]))} and {len(group) - FIRST_LISTED} more"
