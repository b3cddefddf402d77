"""The gate that is not trained, but computed from mean hidden states."""

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
    """Compute the router from the mean hidden states of each task, without training; then choose as `top-k` does.

    The weights of an expert are the mean state of its own task minus the mean of the other tasks' states, scaled to
    length 1. This is how mergekit subtracts the state of negative prompts from that of positive ones. What differs:

    - The states are means over all clean tokens of a task, not over a few prompts that a user writes (mergekit's
      mode `hidden_avg`; its mode `hidden` takes the last token).
    - The negative examples of an expert are those of all other tasks, each task with the same weight. In mergekit a
      user writes them, or leaves them out.
    - The states are those that the router receives, the inputs of the MLPs. mergekit takes the inputs of the
      transformer's blocks, which are not normalised.

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
        """Build the router of one layer. Its weights have no meaning before `set_from_states`."""
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
        (E, D). If there is only one state, nothing is subtracted; a difference of zeros stays zeros.
    """
    states = states.float()
    others = (states.sum(0) - states) / max(1, len(states) - 1)
    return F.normalize(states - others, dim=-1)
