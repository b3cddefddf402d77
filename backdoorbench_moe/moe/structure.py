"""Optional protocols by which a model describes its parts, so that defenses and analyses work on any model.

A model may implement any of them, or none. Users ask with `isinstance` and say which one they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class ChannelGroup:
    """A range of output channels of one layer, which are ranked against each other and pruned.

    Attributes:
        name: What the channels are, such as "expert 0".
        layer: A convolution, whose output is (B, channels, H, W), or a linear layer, whose output is
            (..., channels). Row c of its `weight`, and of its `bias` if it has one, belongs to channel c.
        start: First channel of the group.
        stop: Index behind the last channel of the group.
        norm: The batch norm that directly follows a convolution, with the same channels, or None.
        tap: Module whose output (..., channels) holds the layer's channels, to be read by a forward hook; needed
            if the layer's weights are used without calling the layer. None if the layer itself can be hooked.
    """

    name: str
    layer: nn.Module
    start: int
    stop: int
    norm: nn.BatchNorm2d | None = None
    tap: nn.Module | None = None

    @classmethod
    def whole(cls, name: str, layer: nn.Module, norm: nn.BatchNorm2d | None = None) -> ChannelGroup:
        """The group of all output channels of a convolution or linear layer."""
        return cls(name, layer, 0, channels_of(layer), norm)

    def __len__(self) -> int:
        return self.stop - self.start


def channels_of(layer: nn.Module) -> int:
    """Number of output channels of a convolution or linear layer."""
    assert isinstance(layer.weight, Tensor)
    return len(layer.weight)


@dataclass(frozen=True)
class Expert:
    """One expert of a routed model and where its weights and outputs are found.

    Ranges of rows are (start, stop) along the first dimension of a tensor in the model's state dict.

    Attributes:
        layer: Dotted name of the routed layer, as in `Routing.layer`.
        index: Number of the expert in the layer's gates (B, E, P), 0 to E - 1.
        own: The rows that belong to this expert alone, by state-dict name. The expert's row of the router is not
            among them.
        output: Those of the rows in `own` that mute the expert when they are set to zero: whatever its tap passes
            then has no effect on the logits. They are weights and biases, or a buffer that training does not change.
        tap: Module whose output (B, channels, ...) holds the expert's output. A forward hook on it can read or
            replace the output.
        channels: (start, stop) of the expert's channels in the tap's output.
    """

    layer: str
    index: int
    own: Mapping[str, tuple[int, int]]
    output: Mapping[str, tuple[int, int]]
    tap: nn.Module
    channels: tuple[int, int]

    @property
    def name(self) -> str:
        """Layer and index, such as "moe/2"."""
        return f"{self.layer}/{self.index}"


@runtime_checkable
class WithExperts(Protocol):
    """A routed model that says where each expert's weights and outputs are. Needed by what works on single experts."""

    def experts(self) -> list[Expert]:
        """All experts, those of the first routed layer first, and within a layer in the order of its gates."""


@runtime_checkable
class MasksExperts(Protocol):
    """A routed model whose router can exclude an expert; only useful together with `WithExperts`.

    Masking a model that does not implement this mutes the expert. That is the same if experts choose patches. If
    patches choose experts, those of a muted expert would lose one of their experts, whereas masking sends them to the
    next best.
    """

    def mask_expert(self, expert: Expert) -> None:
        """Exclude an expert from routing, in place: its patches go to the next best expert.

        The change is part of the state dict, whose names and shapes stay the same, so that a model that is saved and
        loaded still excludes the expert.
        """


@runtime_checkable
class Structured(Protocol):
    """A model that names its components. Needed by defenses that change only some of them."""

    def components(self) -> dict[str, list[nn.Module]]:
        """Modules by component: "experts", "router" and "head", as far as the model has them, without overlap."""

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Channels that can be pruned, by scope.

        "experts": the last channels or hidden units of every expert, a group for each. "trunk": the last convolution
        or hidden layer before the experts, or of the whole model if it has no experts.
        """


@runtime_checkable
class WithFeatures(Protocol):
    """A model with features before its head, the last linear layer: `forward` is `classify(extract_features(images))`.

    The method is not called `features` because many networks have a convolutional trunk of that name.
    """

    def extract_features(self, images: Tensor) -> Tensor:
        """Compute the input of the last linear layer.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, D) features.

        Raises:
            ConfigError: If the model wraps an architecture that has no such layer.
        """

    def classify(self, features: Tensor) -> Tensor:
        """Apply the last linear layer: features (B, D) to logits (B, classes)."""
