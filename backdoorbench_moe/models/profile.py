"""Size of a model and the computational cost of one image or text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backdoorbench_moe.moe.structure import takes_text
from backdoorbench_moe.moe.temporary import evaluation_mode


@dataclass(frozen=True)
class ModelProfile:
    """Size and computational cost of a model.

    Attributes:
        parameters: Number of parameters.
        buffers: Number of floating-point values in the buffers of the state dict, such as running statistics of batch
            norms.
        multiply_adds: Multiply-adds of one image or text in convolutions, linear layers and attention, in the forward
            pass.
    """

    parameters: int
    buffers: int
    multiply_adds: int


def profile_model(model: nn.Module, size: int) -> ModelProfile:
    """Count a model's parameters and buffers, and the multiply-adds of one image or text.

    The model is not changed. All multiply-adds that are computed are counted, including those of experts that a routed
    model computes on patches that they did not select.

    Args:
        model: The model, on any device. On "meta", layers in which tokens choose experts cannot be computed.
        size: Side of the image in pixels; for a model of texts, the number of tokens.
    """
    example = _example(model, size)
    counter = FlopCounterMode(display=False)
    # The counter supports the plain implementation of attention on every device. Gradients are enabled, since without
    # them its module hooks fail on models with learned tokens.
    with evaluation_mode(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(example)
    stored = model.state_dict().keys()
    return ModelProfile(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffers=sum(
            buffer.numel()
            for name, buffer in model.named_buffers()
            if name in stored and buffer.is_floating_point()
        ),
        multiply_adds=counter.get_total_flops() // 2,
    )


def _example(model: nn.Module, size: int) -> Tensor:
    # Models without parameters run on the CPU in float32.
    reference = next(model.parameters(), torch.empty(0, dtype=torch.float32))
    if takes_text(model):
        return torch.zeros(1, size, device=reference.device, dtype=torch.int64)
    return torch.zeros(1, 3, size, size, device=reference.device, dtype=reference.dtype)
