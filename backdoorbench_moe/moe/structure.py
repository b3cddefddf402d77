"""What a model says of its own make, so that a defense can work on any model that says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels `start` to `stop` of `layer`, which are ranked among each other and pruned.

    name: what they are, such as "expert 0". layer: a convolution, (B, channels, H, W) out, or a linear layer,
    (..., channels) out; `weight`, and `bias` if it has one, hold one channel a row. norm: the batch norm behind a
    convolution, whose channel c holds the convolution's channel c; None where there is no such one. tap: the module
    that gives the channels, (..., channels), to be read, where the layer's weights are used without a call of it.
    """

    name: str
    layer: nn.Module
    start: int
    stop: int
    norm: nn.BatchNorm2d | None = None
    tap: nn.Module | None = None

    @classmethod
    def whole(cls, name: str, layer: nn.Module, norm: nn.BatchNorm2d | None = None) -> ChannelGroup:
        """All channels of a convolution or linear layer."""
        return cls(name, layer, 0, channels_of(layer), norm)

    def __len__(self) -> int:
        return self.stop - self.start


def channels_of(layer: nn.Module) -> int:
    """How many output channels a layer has: the rows of its weight."""
    assert isinstance(layer.weight, Tensor)
    return len(layer.weight)


@dataclass(frozen=True)
class Expert:
    """One expert of a routed model, and where it lies in it.

    layer: the routed layer, as `Routing.layer` names it. index: e, its place in the layer's gates (B, E, P).
    own: names in the model's state dict to the rows (dim 0), `start` to `stop`, that belong to this expert
    alone; its row of the router is not among them. output: of these, the weights and biases, or a buffer that
    training leaves as it is, that leave it without any effect on the logits when they are zero, whatever comes
    out of its tap. tap: the module whose output (B, channels, ...) holds what the expert gives, in the channels
    `start` to `stop` of `channels`.
    """

    layer: str
    index: int
    own: Mapping[str, tuple[int, int]]
    output: Mapping[str, tuple[int, int]]
    tap: nn.Module
    channels: tuple[int, int]

    @property
    def name(self) -> str:
        """Such as "moe/2"."""
        return f"{self.layer}/{self.index}"


@runtime_checkable
class WithExperts(Protocol):
    """A routed model that says where each expert lies; optional, and asked for by what works on single ones."""

    def experts(self) -> list[Expert]:
        """All experts, those of the first routed layer first, each layer's in the order of its gates."""


@runtime_checkable
class MasksExperts(Protocol):
    """A routed model whose router can pass an expert over; optional beside `WithExperts`.

    Without it, to mask an expert is to mute it. That is right where experts choose patches, since each
    chooses for itself; where patches choose experts, those of a muted expert would go unserved.
    """

    def mask_expert(self, expert: Expert) -> None:
        """Let no patch go to this expert any more, but to the next best, in place.

        What it changes is part of the state dict, whose names and shapes stay; so a model that is written and
        read again still passes the expert over.
        """


@runtime_checkable
class Structured(Protocol):
    """A model that names its parts; optional, and asked for by defenses that touch only some of them."""

    def components(self) -> dict[str, list[nn.Module]]:
        """The modules that make up the "experts", the "router" and the "head"; those of them it has."""

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """The last convolution or hidden units: of every expert ("experts"), of what is before or all ("trunk")."""
