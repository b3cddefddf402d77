"""Optional protocols by which a model describes its parts, so that defenses and analyses work on any model.

A model may implement any of them, or none. Code that needs one checks for it with `isinstance`, and names it in the
error if the model does not implement it.
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
        stop: One past the last channel of the group.
        norm: The batch norm that directly follows a convolution, with the same channels, or None.
        tap: Module whose output (..., channels) holds the layer's channels, for a forward hook. Needed only if the
            model uses the layer's weights without calling the layer; None if the layer itself can be hooked.
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
    """One expert of a routed model, and where its weights and outputs are.

    Ranges of rows are (start, stop) along the first dimension of a tensor in the model's state dict.

    Attributes:
        layer: Dotted name of the routed layer, as in `Routing.layer`.
        index: Number of the expert in the layer's gates (B, E, P), 0 to E - 1.
        own: The rows that belong to this expert alone, by state-dict name, without the expert's row of the router.
        output: The rows that mute the expert when they are set to zero: its output then has no effect on the logits.
            They are a subset of `own`, either weights and biases or a buffer that training does not change.
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
    """A routed model that says where each expert's weights and outputs are. Needed for work on single experts."""

    def experts(self) -> list[Expert]:
        """Return all experts: those of the first routed layer by index, then those of the second, and so on."""


@runtime_checkable
class MasksExperts(Protocol):
    """A routed model whose router can exclude an expert; only useful together with `WithExperts`.

    In a model that does not implement this, an expert is muted instead. With expert choice (experts select patches)
    both are the same. With token choice (patches select experts) they differ: patches that selected a muted expert
    have one expert less, while patches that selected a masked expert go to the next best one.
    """

    def mask_expert(self, expert: Expert) -> None:
        """Exclude an expert from routing, in place: its patches go to the next best expert.

        The change must be stored in the state dict without new names or shapes, so that the expert is still excluded
        after saving and loading.
        """


@runtime_checkable
class Structured(Protocol):
    """A model that names its components. Needed by defenses that change only some of them."""

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the modules of "experts", "router" and "head". Components that the model lacks are left out.

        No parameter belongs to two components.
        """

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the channels that can be pruned, by scope.

        "experts": the last channels or hidden units of each expert, one group per expert. "trunk": the last convolution
        or hidden layer before the experts; if the model has no experts, the last one of the model.
        """


@runtime_checkable
class WithFeatures(Protocol):
    """A model whose `forward` is `classify(extract_features(images))`, where `classify` is the last linear layer.

    The method is not called `features` because many networks have a convolutional trunk of that name.
    """

    def extract_features(self, images: Tensor) -> Tensor:
        """Compute the input of the last linear layer.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, D) features.

        Raises:
            ConfigError: The model wraps an architecture that does not end in a linear layer.
        """

    def classify(self, features: Tensor) -> Tensor:
        """Apply the last linear layer.

        Args:
            features: (B, D).

        Returns:
            (B, classes) logits.
        """
