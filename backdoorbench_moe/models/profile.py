"""How large a model is and what one image costs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelProfile:
    """parameters: trained numbers. buffers: other floating-point numbers kept, such as BN's statistics.

    multiply_adds: multiply-adds of one image's forward pass in convolutions, dense layers and attention.
    """

    parameters: int
    buffers: int
    multiply_adds: int


def profile_model(model: nn.Module, image_size: int) -> ModelProfile:
    """Count what `model` holds, and run one empty (1, 3, image_size, image_size) image through it.

    The model is left as it was. Routed models are counted as they compute: a patch that no expert chose
    costs what a chosen one does where the code computes both.
    """
    reference = next(model.parameters())
    training = {module: module.training for module in model.modules()}
    images = torch.zeros(1, 3, image_size, image_size, device=reference.device, dtype=reference.dtype)
    counter = FlopCounterMode(display=False)
    model.eval()
    try:
        # The plain form of attention is the one made of products the counter knows on every device. Gradients
        # are on because the counter's module hooks fail without them on models with learned tokens.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(images)
    finally:
        for module, was_training in training.items():
            module.training = was_training
    return ModelProfile(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffers=sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point()),
        multiply_adds=counter.get_total_flops() // 2,
    )
