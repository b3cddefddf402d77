"""Reading the inputs of a model's MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from backdoorbench_moe.moe.structure import Mergeable


@contextmanager
def mlp_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the MLPs of a `Mergeable` model are given by one forward pass inside the block.

    Yields:
        A list that the forward pass fills: one tensor (B, N, D) for each MLP, first layer first, with the tokens before
        the patches first. Gradients flow through the tensors.
    """
    assert isinstance(model, Mergeable)
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        tokens = arguments[0]
        inputs.append(tokens.reshape(len(tokens), -1, tokens.shape[-1]))

    hooks = [mlp.register_forward_pre_hook(keep) for mlp in model.mlps().values()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
