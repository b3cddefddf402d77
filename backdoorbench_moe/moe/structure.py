"""Optional protocols by which a model describes its parts, so that defenses and analyses work on any model.

A model may implement any of these protocols, or none. Code that needs a protocol checks with `isinstance` whether the
model implements it. Otherwise it raises an error that names the missing methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

# Keyword arguments that the engine gives to a model, as the data determine them. A model of texts says in its class
# attribute `data_options` that it takes those of texts; it may also take "padding", the token that fills up short ones,
# and keep it as its attribute of this name.
IMAGE_OPTIONS = ("num_classes", "image_size")
TEXT_OPTIONS = ("vocabulary", "context")


def data_options(model: object) -> tuple[str, ...]:
    """Return the names of the keyword arguments that a model, or its class, is given for the data."""
    return tuple(getattr(model, "data_options", IMAGE_OPTIONS))


def takes_text(model: object) -> bool:
    """Whether a model, or its class, maps token ids (B, T) int64 to logits (B, T, vocabulary), and not images."""
    return set(TEXT_OPTIONS) <= set(data_options(model))


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
        tap: Module whose output (..., channels) is the output of the layer, so that a forward hook can read it. It is
            needed only if the model uses the layer's weights without calling the layer. None otherwise.
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
        output: The rows that mute the expert when they are set to zero, that is, its output then has no effect on the
            logits. They are a subset of `own`: weights and biases, or a buffer that training does not change.
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
    """A routed model that says where each expert's weights and outputs are.

    Needed by defenses and analyses that change or measure single experts.
    """

    def experts(self) -> list[Expert]:
        """Return all experts: those of the first routed layer by index, then those of the second, and so on."""


@runtime_checkable
class MasksExperts(Protocol):
    """A routed model whose router can exclude an expert. It should also implement `WithExperts`.

    If a model does not implement this protocol, experts are muted instead (see `Expert.output`). In expert-choice
    routing, in which experts select patches, muting and masking have the same effect. In token-choice routing, in which
    patches select experts, they differ: a patch that selected a muted expert is processed by one expert less, while a
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

        Components that the model does not have are left out. No parameter may belong to two components.
        """

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the channels that can be pruned, by scope. Scopes that the model does not have are left out.

        "experts" has one group for each expert: the output channels of its last convolution, or its hidden units.
        "trunk" has the channels of the last convolution or hidden layer before the experts; or, if the model has no
        experts, of the last one in the model.
        """


@runtime_checkable
class WithFeatures(Protocol):
    """A model whose `forward` is `classify(extract_features(images))`, where `classify` is the last linear layer.

    The name `features` is avoided, since it is the name of the convolutional trunk in many networks.
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
    """A dense model whose MLPs can become the experts of a mixture. All other weights stay those of the base.

    A mixture of E such models, tuned from one base, has an MoE layer in place of each MLP. A model of images also has
    to be `Mergeable`, as its tokens are patches; the tokens of a model of texts are the positions of the text.
    """

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLPs by dotted name, first layer first.

        Each has an input (B, ..., D), and unless the model `MergesItself` the form that `Mergeable.mlps` describes.
        """


@runtime_checkable
class Mergeable(WithMLPs, Protocol):
    """A dense model of images whose MLPs can become the experts of a mixture, see `WithMLPs`.

    The model must also have the attribute `patch_size`, the side in pixels of the image tile that belongs to a patch.
    """

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLPs by dotted name, first layer first.

        Each has an input (B, ..., D), and is of one of two forms. A plain MLP has the linear layers `fc1` (hidden
        units, D) and `fc2` (D, hidden units) with biases, and between them only the activation `act`, and dropouts
        `drop1` and `drop2` if it has any. A gated MLP, as in Llama, has the linear layers `gate_proj` and `up_proj`
        (hidden units, D) and `down_proj` (D, hidden units) without biases, and the activation `act_fn` behind
        `gate_proj`. All of them have the same tokens: first `num_prefix_tokens`, then the patches of `patch_grid`.

        Raises:
            ConfigError: The model wraps an architecture whose MLPs are of another form.
        """

    def token_layout(self) -> tuple[tuple[int, int], int]:
        """Return rows and columns of the patches, and the number of tokens before them, such as class tokens."""


@runtime_checkable
class MergesItself(WithMLPs, Protocol):
    """A dense model of texts whose MLPs are of another form, and which says itself what it is merged to."""

    def merge(self, num_experts: int, gate: Callable[[int, int], nn.Module]) -> nn.Module:
        """Return a mixture of E copies of this model, a `RoutedModel` that is `Merged`.

        Args:
            num_experts: Number of experts E.
            gate: Builds the router of one layer from the number of features D and E, see `gates.base.Gate`.
        """


@runtime_checkable
class Merged(Protocol):
    """A mixture that was merged from E experts.

    Attributes:
        num_experts: Number of experts E.
    """

    num_experts: int

    def routers(self) -> list[nn.Module]:
        """Return the router of each layer, first layer first: what is trained after the merge."""

    def load_experts(self, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> None:
        """Load E experts, in place: their MLPs, and everything else from the base. See `moe.merging.load_experts`."""


@runtime_checkable
class Generates(Protocol):
    """A model of texts that continues them by itself, faster than one pass over the whole text for every token."""

    def generate(self, tokens: Tensor, lengths: Tensor, new_tokens: int, end: int) -> Tensor:
        """Continue texts greedily: the most probable token, and so on.

        Args:
            tokens: (B, T) int64, padded on the right.
            lengths: (B,) int64, number of tokens of each that are not padding, from 1.
            new_tokens: Number of tokens to add, from 1.
            end: The token with which an answer ends; what follows it does not matter.

        Returns:
            (B, new_tokens) int64.
        """
