"""MoE layers, which replace MLPs in models.

A sparse layer has three independent parts: a `Router` decides which experts process each token, `dispatch` computes
the outputs, and `Experts` define the function and hold the weights. To add another gate, subclass `LinearRouter` (or
`Router`, if the logits are not linear in the token); to add another kind of expert, subclass `Experts`. `SoftMoELayer`
is the layer of Soft MoE. `MoEModel` is the base class of models with such layers.

Axis letters: B batch, N tokens of an image, S tokens of the batch (S = B * N), T pairs of a token and an expert,
P patches, E experts, K selected experts, s slots, D features.
"""

from backdoorbench_moe.moe.layers.assignment import (
    Assignment,
    assign_chosen,
    expert_capacity,
    top_experts,
    within_capacity,
)
from backdoorbench_moe.moe.layers.base import MoELayer, collect_routing
from backdoorbench_moe.moe.layers.dispatching import combine, dispatch, scatter_outputs
from backdoorbench_moe.moe.layers.experts import Experts, MLPExperts, StackedLinear
from backdoorbench_moe.moe.layers.gated import GatedMLPExperts
from backdoorbench_moe.moe.layers.losses import (
    balance_loss,
    importance_loss,
    load_loss,
    squared_variation,
)
from backdoorbench_moe.moe.layers.merged_routers import MergedRouter, SampleTop1Router, TopKSoftmaxRouter
from backdoorbench_moe.moe.layers.model import MoEModel
from backdoorbench_moe.moe.layers.padding import ignored, ignored_positions
from backdoorbench_moe.moe.layers.routers import (
    ExpertChoiceRouter,
    LinearRouter,
    Router,
    RouterOutput,
    TopKRouter,
)
from backdoorbench_moe.moe.layers.soft import SoftMoELayer, SoftRouter
from backdoorbench_moe.moe.layers.sparse import SparseMoELayer
from backdoorbench_moe.moe.layers.tap import Tap

__all__ = [
    "Assignment",
    "ExpertChoiceRouter",
    "Experts",
    "GatedMLPExperts",
    "LinearRouter",
    "MLPExperts",
    "MergedRouter",
    "MoELayer",
    "MoEModel",
    "Router",
    "RouterOutput",
    "SampleTop1Router",
    "SoftMoELayer",
    "SoftRouter",
    "SparseMoELayer",
    "StackedLinear",
    "Tap",
    "TopKRouter",
    "TopKSoftmaxRouter",
    "assign_chosen",
    "balance_loss",
    "collect_routing",
    "combine",
    "dispatch",
    "expert_capacity",
    "ignored",
    "ignored_positions",
    "importance_loss",
    "load_loss",
    "scatter_outputs",
    "squared_variation",
    "top_experts",
    "within_capacity",
]
