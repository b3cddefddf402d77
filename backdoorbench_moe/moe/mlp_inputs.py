"""Reading the inputs of a model's MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from backdoorbench_moe.moe.structure import Mergeable


@contextmanager
def mlp_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the inputs of the MLPs of a `Mergeable` model inside the block.

    Yields:
        A dict that each forward pass fills anew: name of the MLP to (B, N, D), first layer first, not detached from the
        graph. The N tokens are those before the patches, and then the patches row by row.
    """
    assert isinstance(model, Mergeable)
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: inputs.update({name: given[0].flatten(1, -2)})

    hooks = [mlp.register_forward_pre_hook(keep(name)) for name, mlp in model.mlps().items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
