"""Optional protocols by which a model describes its parts, so that defenses and analyses work on any model.

A model may implement any of these protocols, or none. Code that needs a protocol checks with `isinstance` whether the
model implements it. Otherwise it raises an error that names the missing methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

# Keyword arguments that the engine derives from the data and passes to a model. A language model declares those of
# texts in its class attribute `data_options`. It may also take "padding", the token that fills up short texts, which it
# stores as an attribute of the same name.
IMAGE_OPTIONS = ("num_classes", "image_size")
TEXT_OPTIONS = ("vocabulary", "context")

# Side in pixels of the tiles of a model without patches, as in BadPatches (section 4: 4x4 on 32x32 images).
DEFAULT_PATCH_SIZE = 4


def data_options(model: object) -> tuple[str, ...]:
    """Return the names of the keyword arguments for the data that a model or its class takes."""
    return tuple(getattr(model, "data_options", IMAGE_OPTIONS))


def takes_text(model: object) -> bool:
    """Return whether a model or its class maps token ids (B, T) int64 to logits (B, T, vocabulary)."""
    return set(TEXT_OPTIONS) <= set(data_options(model))


def patch_size_of(model: nn.Module) -> int | None:
    """Return the side of a model's patches in pixels, its attribute `patch_size`; None if it has none."""
    size = getattr(model, "patch_size", None)
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class ChannelGroup:
    """A range of output channels of one layer. Pruning compares the channels of a group with each other.

    Attributes:
        name: What the channels are, such as "expert 0".
        layer: A convolution, whose output is (B, channels, H, W), or a linear layer, whose output is
            (..., channels). Row c of its `weight`, and of its `bias` if it has one, belongs to channel c.
        start: First channel of the group.
        stop: One past the last channel of the group.
        norm: The batch norm that directly follows a convolution, with the same channels, or None.
        tap: Module whose output (..., channels) is the output of the layer, so that a forward hook can read it. Needed
            only if the model uses the layer's weights without calling the layer; otherwise None.
    """

    name: str
    layer: nn.Module
    start: int
    stop: int
    norm: nn.BatchNorm2d | None = None
    tap: nn.Module | None = None

    @classmethod
    def whole(cls, name: str, layer: nn.Module, norm: nn.BatchNorm2d | None = None) -> ChannelGroup:
        """Return the group of all output channels of a convolution or linear layer."""
        return cls(name, layer, 0, channels_of(layer), norm)

    def __len__(self) -> int:
        return self.stop - self.start


def channels_of(layer: nn.Module) -> int:
    """Return the number of output channels of a convolution or linear layer."""
    assert isinstance(layer.weight, Tensor)
    return len(layer.weight)


@dataclass(frozen=True)
class Expert:
    """One expert of a routed model, and where its weights and outputs are.

    Ranges of rows are (start, stop) along the first dimension of a tensor in the model's state dict.

    Attributes:
        layer: Dotted name of the routed layer, as in `Routing.layer`.
        index: Index of the expert along E in the layer's gates (B, E, P), 0 to E - 1.
        own: The rows that only this expert uses, by state-dict name. The expert's row of the router is not included.
        output: The rows that mute the expert if they are set to zero, so that its output has no effect on the logits.
            They are a subset of `own`: weights and biases, or a buffer that training does not change.
        tap: Module whose output (B, channels, ...) contains the expert's output. A forward hook on it can read or
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
    """A routed model that describes where each expert's weights and outputs are.

    Needed by defenses and analyses that change or measure single experts.
    """

    def experts(self) -> list[Expert]:
        """Return all experts, ordered by layer and then by index."""


@runtime_checkable
class MasksExperts(Protocol):
    """A routed model whose router can exclude an expert. It should also implement `WithExperts`.

    If a model does not implement this protocol, experts are muted instead (see `Expert.output`). In expert-choice
    routing, where experts select patches, muting and masking have the same effect. In token-choice routing, where
    patches select experts, they differ: a patch that selected a muted expert is processed by one expert fewer, while a
    patch that selected a masked expert is sent to the next best expert.
    """

    def mask_expert(self, expert: Expert) -> None:
        """Exclude an expert from routing, in place. Its patches are sent to the next best expert.

        The change must be stored in the state dict without new names or shapes, so that the expert is still excluded
        after saving and loading.
        """


@runtime_checkable
class Structured(Protocol):
    """A model that names its components. Needed by defenses that change only some of them."""

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the modules of each component: "experts", "router" and "head" (the classifier).

        Components that the model does not have are omitted. No parameter may belong to two components.
        """

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the channels that can be pruned, by scope. Scopes that the model does not have are omitted.

        "experts" contains one group for each expert: the output channels of its last convolution, or its hidden units.
        "trunk" contains the channels of the last convolution or hidden layer before the experts, or of the last one in
        the model if it has no experts.
        """


@runtime_checkable
class WithFeatures(Protocol):
    """A model whose `forward` is `classify(extract_features(images))`, where `classify` is the last linear layer.

    The methods are not called `features`, since many networks use this name for the convolutional trunk.
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


@runtime_checkable
class WithMLPs(Protocol):
    """A dense model whose MLPs can become the experts of a mixture. All other weights remain those of the base.

    In a mixture of E such models, fine-tuned from one base, an MoE layer replaces each MLP. The tokens of a language
    model are the positions of the text. A model of images, whose tokens are patches, must also be `Mergeable`.
    """

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLPs by dotted name, in the order of the layers.

        Each has an input (B, ..., D) and, unless the model is `MergesItself`, one of the structures that
        `Mergeable.mlps` describes.
        """


@runtime_checkable
class Mergeable(WithMLPs, Protocol):
    """A dense model of images whose MLPs can become the experts of a mixture, see `WithMLPs`.

    The model must also have the attribute `patch_size`, the side in pixels of the image tile that belongs to a patch.
    """

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLPs by dotted name, in the order of the layers.

        Each has an input (B, ..., D) and one of two structures. A plain MLP has the linear layers `fc1` (hidden units,
        D) and `fc2` (D, hidden units) with biases, the activation `act` between them, and optionally dropouts: `drop1`
        after the activation and `drop2` after `fc2`. A gated MLP, as in Llama, has the linear layers `gate_proj` and
        `up_proj` (hidden units, D) and `down_proj` (D, hidden units) without biases, and the activation `act_fn` after
        `gate_proj`. Other submodules may only be identities. All MLPs have the same tokens, as described by
        `token_layout`.

        Raises:
            ConfigError: The model wraps an architecture whose MLPs have another structure.
        """

    def token_layout(self) -> tuple[tuple[int, int], int]:
        """Return the rows and columns of patches, and the number of tokens before them, such as class tokens."""


@runtime_checkable
class MergesItself(WithMLPs, Protocol):
    """A dense language model that implements its own merging, since its MLPs have another structure."""

    def merge(self, num_experts: int, gate: Callable[[int, int], nn.Module]) -> nn.Module:
        """Return a mixture of E copies of this model, which is a `RoutedModel` and implements `Merged`.

        Args:
            num_experts: Number of experts E.
            gate: Function that builds the router of one layer from D and E, such as a `gates.base.Gate`.
        """


@runtime_checkable
class Merged(Protocol):
    """A mixture that was merged from E experts.

    Attributes:
        num_experts: Number of experts E.
    """

    num_experts: int

    def routers(self) -> list[nn.Module]:
        """Return the router of each layer, in order. Only the routers are trained after merging."""

    def load_experts(self, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> None:
        """Load the MLPs of E experts and all other weights of the base, in place; see `moe.merging.load_experts`."""


@runtime_checkable
class Generates(Protocol):
    """A language model with its own generation, which is faster than a forward pass over the text for every token."""

    def generate(self, tokens: Tensor, lengths: Tensor, new_tokens: int, end: int) -> Tensor:
        """Continue texts greedily with the most probable tokens.

        Args:
            tokens: (B, T) int64, padded on the right.
            lengths: (B,) int64, number of tokens of each text without padding, at least 1.
            new_tokens: Number of tokens to add, at least 1.
            end: The token that ends an answer; the tokens after it are ignored.

        Returns:
            (B, new_tokens) int64.
        """
