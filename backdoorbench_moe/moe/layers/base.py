"""The base class of MoE layers, and a context that collects their routing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.layers.experts import Experts
from backdoorbench_moe.moe.layers.tap import Tap
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.moe.structure import Expert

_collected: ContextVar[list[Routing] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_routing() -> Iterator[list[Routing]]:
    """Collect the routing of every MoE layer that runs inside the block, in the current thread.

    The blocks of a library's transformer only pass tokens from layer to layer. A model built from them calls its
    network inside this block to obtain the routing as well:

        with collect_routing() as routing:
            logits = self.network(images)
        return RoutedOutput(logits, routing)

    Yields:
        A list that each layer appends its routing to. Blocks may be nested; only the innermost collects.
    """
    found: list[Routing] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


class MoELayer(nn.Module, ABC):
    """Base class of MoE layers, which consist of a router and E experts and can replace an MLP.

    Subclasses set `router`, whose `masked` (E,) marks experts that are not used, and implement `route`.

    Args:
        experts: The experts.
        name: Dotted name of the layer in its model, which is also `Routing.layer` and `Expert.layer`.
        num_prefix_tokens: Number of tokens before the patches, such as class and register tokens. They are routed
            like patches but omitted from the reported routing.

    Attributes:
        tap: Tap that passes the contribution of each expert, in a shape (B, E, ...) that the subclass documents.
    """

    router: nn.Module

    def __init__(self, experts: Experts, *, name: str, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.name, self.num_prefix_tokens = name, num_prefix_tokens
        self.experts, self.tap = experts, Tap()

    @abstractmethod
    def route(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Compute the layer.

        Args:
            tokens: (B, N, D).

        Returns:
            Outputs (B, N, D), and the routing of the P = N - num_prefix_tokens patches.
        """

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the layer and pass its routing to `collect_routing`.

        Args:
            tokens: (B, ..., D), such as (B, N, D) in a transformer or (B, H, W, D) in a convolutional network. The axes
                between the first and the last are flattened, row by row.

        Returns:
            Outputs of the same shape.
        """
        outputs, routing = self.route(tokens.flatten(1, -2))
        if (found := _collected.get()) is not None:
            found.append(routing)
        return outputs.reshape(tokens.shape)

    def locate_experts(self) -> list[Expert]:
        """Return the experts for `WithExperts`. They are muted by the buffer `heard`."""
        rows = {
            f"{self.name}.experts.{key}": len(tensor) // len(self.experts)
            for key, tensor in self.experts.state_dict().items()
        }
        found = []
        for e in range(len(self.experts)):
            own = {key: (e * size, (e + 1) * size) for key, size in rows.items()}
            output = {key: value for key, value in own.items() if key.endswith(".heard")}
            found.append(Expert(self.name, e, own, output, self.tap, (e, e + 1)))
        return found

    @torch.no_grad()
    def mask_expert(self, index: int) -> None:
        """Exclude expert `index`, 0 to E - 1, from routing, in place."""
        masked = self.router.masked
        assert isinstance(masked, Tensor)
        masked[index] = True
