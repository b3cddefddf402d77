"""A plain implementation of pMoE from its description: Keras layout, one expert after the other.

`weights` is the list of 70 arrays in the order of the reference's get_weights(), as tensors. No code is shared with the
package.
"""

import torch
import torch.nn.functional as F


def conv_same(x, kernel, bias, stride=1):
    """x (B, H, W, C); kernel (k, k, in, out). Pads as TensorFlow's SAME: the odd pixel at bottom and right."""
    size, k = x.shape[1], kernel.shape[0]
    total = max((-(-size // stride) - 1) * stride + k - size, 0)
    before, after = total // 2, total - total // 2
    x = F.pad(x.permute(0, 3, 1, 2), (before, after, before, after))
    return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride).permute(0, 2, 3, 1)


def batch_norm(x, arrays, training, moving):
    """arrays: gamma, beta, mean, variance. Training appends the new moving mean and variance to `moving`."""
    gamma, beta, mean, variance = arrays
    if training:
        count = x.shape[0] * x.shape[1] * x.shape[2]
        old_mean, old_variance = mean, variance
        mean = x.mean((0, 1, 2))
        variance = ((x - mean) ** 2).mean((0, 1, 2))
        unbiased = variance * count / (count - 1)
        moving.append(
            (0.99 * old_mean + 0.01 * mean.detach(), 0.99 * old_variance + 0.01 * unbiased.detach())
        )
    return (x - mean) / (variance + 1e-3) ** 0.5 * gamma + beta


def plain_pmoe(images, weights, *, top_k, training, num_experts=4):
    """images (B, 3, H, W). Returns logits, gates (B, E, P), selected (B, E, P), moving statistics in order.

    Moving statistics come in the order the norms are run, which is the order of the list.
    """
    queue = list(weights)
    moving = []

    def take(count):
        taken = queue[:count]
        del queue[:count]
        return taken

    def block(x, stride):
        norm1, conv1, norm2, shortcut, conv2 = take(4), take(2), take(4), take(2), take(2)
        y = conv_same(batch_norm(x, norm1, training, moving).relu(), *conv1, stride)
        y = conv_same(batch_norm(y, norm2, training, moving).relu(), *conv2)
        return conv_same(x, *shortcut, stride) + y

    x = conv_same(images.permute(0, 2, 3, 1), *take(2))
    x = block(block(x, 1), 2)
    x = conv_same(batch_norm(x, take(4), training, moving).relu(), *take(2), 2)
    kernels = take(num_experts)
    norms = [take(4) for _ in range(num_experts)]
    convs = [take(2) for _ in range(num_experts)]
    gates, selected, parts = [], [], []
    for kernel, norm, conv in zip(kernels, norms, convs, strict=True):
        gate = conv_same(x, kernel, None).flatten(1).softmax(1)
        chosen = torch.zeros_like(gate, dtype=torch.bool)
        for row, mark in zip(gate, chosen, strict=True):
            mark[row.topk(top_k).indices] = True
        routed = x * (gate * chosen).reshape(*x.shape[:3], 1)
        parts.append(conv_same(batch_norm(routed, norm, training, moving).relu(), *conv))
        gates.append(gate)
        selected.append(chosen)
    x = batch_norm(torch.cat(parts, 3), take(4), training, moving).relu().mean((1, 2))
    kernel, bias = take(2)
    assert not queue
    return x @ kernel + bias, torch.stack(gates, 1), torch.stack(selected, 1), moving
