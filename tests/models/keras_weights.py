"""Weights and batches for the comparison with Keras. Only numpy is needed, so that `keras_golden.py` can import it."""

import numpy as np


def draw_weights(widen_factor=1, moe_channels=8, expert_channels=4, num_experts=4, num_classes=3, seed=0):
    """Random weights in the order of the reference's get_weights(); also for gammas, betas and biases."""
    # Its numbers are the same in all versions of numpy, unlike those of default_rng.
    random = np.random.RandomState(seed)

    def draw(*shape, scale=1.0):
        return scale * random.standard_normal(shape)

    def norm(channels):
        variance = np.abs(draw(channels)) + 0.5
        return [1 + draw(channels, scale=0.2), draw(channels, scale=0.2), draw(channels, scale=0.1), variance]

    def conv(kernel, fan_in, fan_out):
        scale = (2 / (kernel * kernel * fan_in)) ** 0.5
        return [draw(kernel, kernel, fan_in, fan_out, scale=scale), draw(fan_out, scale=0.1)]

    def block(fan_in, fan_out):
        inner = norm(fan_in) + conv(3, fan_in, fan_out) + norm(fan_out)
        return inner + conv(1, fan_in, fan_out) + conv(3, fan_out, fan_out)

    wide1, wide2, joined = 16 * widen_factor, 32 * widen_factor, num_experts * expert_channels
    weights = conv(3, 3, 16) + block(16, wide1) + block(wide1, wide2)
    weights += norm(wide2) + conv(3, wide2, moe_channels)
    weights += [draw(1, 1, moe_channels, 1, scale=0.5) for _ in range(num_experts)]
    for _ in range(num_experts):
        weights += norm(moe_channels)
    for _ in range(num_experts):
        weights += conv(1, moe_channels, expert_channels)
    return [*weights, *norm(joined), draw(joined, num_classes, scale=0.5), draw(num_classes, scale=0.1)]


def draw_batches(batches=3, size=8, side=16, num_classes=3, seed=1):
    """Images (batches, size, side, side, 3) float32 in [0, 1] and labels (batches, size)."""
    random = np.random.RandomState(seed)
    images = random.random_sample((batches, size, side, side, 3)).astype(np.float32)
    return images, random.randint(0, num_classes, (batches, size))
