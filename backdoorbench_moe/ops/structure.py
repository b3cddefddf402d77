"""What a model says of its own make, so that a defense can work on any model that says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels `start` to `stop` of `conv`, which are ranked among each other and pruned.

    name: what they are, such as "expert 0". norm: the batch norm behind the convolution, whose channel c
    holds the convolution's channel c; None where there is no such one.
    """

    name: str
    conv: nn.Conv2d
    start: int
    stop: int
    norm: nn.BatchNorm2d | None = None

    @classmethod
    def whole(cls, name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> ChannelGroup:
        """All channels of a convolution."""
        return cls(name, conv, 0, conv.out_channels, norm)

    def __len__(self) -> int:
        return self.stop - self.start


@runtime_checkable
class Structured(Protocol):
    """A model that names its parts; optional, and asked for by defenses that touch only some of them."""

    def components(self) -> dict[str, list[nn.Module]]:
        """The modules that make up the "experts", the "router" and the "head"; those of them it has."""

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """The last convolution of every expert ("experts") and of what comes before or is all ("trunk")."""
