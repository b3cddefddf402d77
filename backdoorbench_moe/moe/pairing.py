"""Finding the convolutions that each batch norm normalises, by running the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from backdoorbench_moe.moe.norms import batch_norms
from backdoorbench_moe.moe.temporary import hooked


def convolutions_before(model: nn.Module, images: Tensor) -> dict[str, tuple[str, ...]]:
    """Find the convolutions whose outputs are the input of each batch norm.

    The input of a norm is either the output of one convolution, as in a post-activation network (convolution, norm,
    ReLU), or a sum in which outputs of convolutions are terms. The latter occurs in pre-activation networks, where the
    norm precedes the convolution of its block: its input is the sum of the previous block's last convolution and
    shortcut. An identity shortcut is not a convolution; the convolutions of earlier blocks whose outputs it passes on
    belong to the norms directly after these blocks. A convolution counts as a term of a sum only if its output is not
    directly the input of a norm.

    Args:
        model: The model, in evaluation mode. It is not changed.
        images: (B, 3, H, W) in [0, 1], of the size that the model was built for.

    Returns:
        The names of the convolutions by the name of the norm, in the order of computation, for each batch norm with a
        scale and running statistics that was called and has such convolutions.
    """
    made: dict[Any, str] = {}
    taken: dict[str, Any] = {}
    hooks = [
        *(
            module.register_forward_hook(_remember(made, name))
            for name, module in model.named_modules()
            if isinstance(module, _ConvNd)
        ),
        *(
            norm.register_forward_pre_hook(_remember_input(taken, name))
            for name, norm in batch_norms(model).items()
        ),
    ]
    with hooked(hooks), torch.enable_grad():
        # The images need a gradient so that the graph is recorded even if all parameters are frozen.
        model(images.detach().clone().requires_grad_())
    direct = {node for node in taken.values() if node in made}
    found = {
        name: [made[term] for term in _terms(node) if term in made and (term is node or term not in direct)]
        for name, node in taken.items()
    }
    return {name: tuple(convs) for name, convs in found.items() if convs}


def _remember(made: dict[Any, str], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        made[output.grad_fn] = name

    return hook


def _remember_input(taken: dict[str, Any], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken[name] = inputs[0].grad_fn

    return hook


def _terms(node: Any) -> list[Any]:
    """Return the node itself, or, if it is an addition, its terms; nodes are those of autograd's graph."""
    if type(node).__name__ != "AddBackward0":
        return [node]
    return [term for term, _ in node.next_functions]
