"""The base class of models in which MoE layers replace MLPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.layers.base import MoELayer, collect_routing
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput
from backdoorbench_moe.moe.structure import ChannelGroup, Expert


class MoEModel(RoutedModel):
    """A routed model that wraps a network with MoE layers.

    Subclasses set the attributes. To add a classifier, or prunable channels before the experts, they extend
    `components` and `prunable`.

    Attributes:
        network: A module that maps images to logits. Its MoE layers are registered in the order of computation, and
            their names are their dotted names in the model, which begin with "network.".
    """

    network: nn.Module

    def layers(self) -> list[MoELayer]:
        """Return the MoE layers in the order of computation."""
        return [layer for layer in self.network.modules() if isinstance(layer, MoELayer)]

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes) and the routing of every MoE layer.

        A network for texts maps tokens (B, T) to logits (B, T, vocabulary).
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
        """Return all experts. Each has a range of rows of the stacked weights of its layer."""
        return [expert for layer in self.layers() for expert in layer.locate_experts()]

    @torch.no_grad()
    def mask_expert(self, expert: Expert) -> None:
        """Exclude an expert from routing, in place; see `MoELayer.mask_expert`."""
        layer = self.get_submodule(expert.layer)
        assert isinstance(layer, MoELayer)
        layer.mask_expert(expert.index)
