"""The gate that is computed from mean hidden states instead of being trained."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.gates.checks import check_top_k
from backdoorbench_moe.moe.layers import Router, TopKSoftmaxRouter


class Hidden(Gate):
    """Compute the router from the mean hidden states of each task, without training; experts are chosen as by `top-k`.

    The weights of an expert are the mean state of its own task minus the mean of the other tasks' states, scaled to
    length 1. mergekit subtracts the state of negative prompts from that of positive ones in the same way. Differences
    from mergekit:

    - The states are means over all clean tokens of a task. mergekit uses a few prompts that the user writes (their
      mean in mode `hidden_avg`, their last token in mode `hidden`).
    - The negative examples of an expert are those of all other tasks, with equal weights. In mergekit they are
      optional and written by the user.
    - The states are the inputs of the MLPs, which the router receives. mergekit uses the inputs of the transformer
      blocks, which are not normalised.

    Args:
        top_k: Experts for each token, 1 to E.

    Raises:
        ConfigError: A value is out of range.

    Source:
        arcee-ai/mergekit, mergekit/moe/router.py.
    """

    trained: ClassVar[bool] = False

    def __init__(self, *, top_k: int = 2) -> None:
        super().__init__()
        check_top_k("hidden", top_k)
        self.top_k = top_k

    def check(self, num_experts: int) -> None:
        """Raise ConfigError if `top_k` is larger than the number of experts."""
        check_top_k("hidden", self.top_k, num_experts)

    def build(self, features: int, num_experts: int) -> Router:
        """Build the router of one layer; `set_from_states` must then set its weights."""
        return TopKSoftmaxRouter(features, num_experts, top_k=self.top_k, balance=0.0)

    @torch.no_grad()
    def set_from_states(self, router: Router, states: Tensor) -> None:
        """Set the weights of a router from mean states (E, D), in place; see `Gate.set_from_states`."""
        assert isinstance(router, TopKSoftmaxRouter)
        if states.shape != router.weight.shape:
            raise ShapeError(
                f"states: expected (E, D) = {tuple(router.weight.shape)}, got {tuple(states.shape)}"
            )
        router.weight.copy_(contrast(states))


def contrast(states: Tensor) -> Tensor:
    """Return each state minus the mean of the others, scaled to length 1.

    Args:
        states: (E, D), one state for each expert.

    Returns:
        (E, D). A single state is only scaled; a difference of zeros is not scaled.
    """
    states = states.float()
    others = (states.sum(0) - states) / max(1, len(states) - 1)
    return F.normalize(states - others, dim=-1)
