"""The base class of models in which MoE layers take the place of MLPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.layers.base import MoELayer, collect_routing
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput
from backdoorbench_moe.moe.structure import ChannelGroup, Expert


class MoEModel(RoutedModel):
    """A network with MoE layers in it, which itself knows nothing of routing.

    A subclass sets the attributes. If it names its classifier or prunable channels before the experts, it adds them to
    what `components` and `prunable` return.

    Attributes:
        network: The network, a module that maps images to logits. Its layers are in the order of their computation,
            and are called after their place in the model, "network....".
    """

    network: nn.Module

    def layers(self) -> list[MoELayer]:
        """Return the MoE layers, first layer first."""
        return [layer for layer in self.network.modules() if isinstance(layer, MoELayer)]

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes) and the routing of every MoE layer.

        Of a network of texts, these are tokens (B, T) and logits (B, T, vocabulary).
        """
        with collect_routing() as routing:
            logits = self.network(images)
        return RoutedOutput(logits, routing)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the experts and routers of all MoE layers."""
        layers = self.layers()
        return {"experts": [layer.experts for layer in layers], "router": [layer.router for layer in layers]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the hidden units of each expert in the last MoE layer."""
        return {"experts": self.layers()[-1].experts.channel_groups()}

    def experts(self) -> list[Expert]:
        """Return all experts. Each has a range of rows of its layer's stacked weights."""
        return [expert for layer in self.layers() for expert in layer.locate_experts()]

    @torch.no_grad()
    def mask_expert(self, expert: Expert) -> None:
        """Exclude an expert from routing, in place, see `MoELayer.mask_expert`."""
        layer = self.get_submodule(expert.layer)
        assert isinstance(layer, MoELayer)
        layer.mask_expert(expert.index)
