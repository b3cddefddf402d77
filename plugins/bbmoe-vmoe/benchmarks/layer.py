"""Time an MoE layer against a dense MLP with as many multiply-adds: python plugins/bbmoe-vmoe/benchmarks/layer.py

The dense MLP has top_k times the hidden units of one expert, so that the cost of a token is the same in both. For Soft
MoE, which has about one slot for each token, it has as many hidden units as one expert. The script prints the time of a
training step (forward and backward) and of a forward pass in evaluation mode, each the median of several alternating
measurements, and their ratio. On a CPU, it measures processor time, which depends less on other processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timm.layers import Mlp
from torch import nn

from backdoorbench_moe.moe.layers import (
    ExpertChoiceRouter,
    MLPExperts,
    SoftMoELayer,
    SoftRouter,
    SparseMoELayer,
    TopKRouter,
)


def make_layers(
    features: int, experts: int, top_k: int, tokens: int
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return MoE layers by name, each with its dense MLP."""

    def make_experts() -> MLPExperts:
        mlp = Mlp(features, 4 * features)
        return MLPExperts(mlp.fc1, mlp.act, mlp.fc2, num_experts=experts, copies=False)

    sparse, same = Mlp(features, 4 * features * top_k), Mlp(features, 4 * features)
    routers = {
        "top-k": TopKRouter(features, experts, top_k=top_k, gate_std=0.02),
        "expert-choice": ExpertChoiceRouter(features, experts, top_k=top_k, gate_std=0.02),
    }
    place = {"name": "layer", "num_prefix_tokens": 1}
    layers: dict[str, tuple[nn.Module, nn.Module]] = {
        name: (SparseMoELayer(make_experts(), router, **place), sparse) for name, router in routers.items()
    }
    soft = SoftRouter(features, experts, max(1, tokens // experts))
    return {**layers, "soft": (SoftMoELayer(make_experts(), soft, **place), same)}


def train_step(module: nn.Module, tokens: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """Return a function that runs one forward and backward pass."""

    def step() -> None:
        module.train()
        # Entered in every step, as in training, since autocast caches the casts of weights until its context ends.
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = module(tokens.requires_grad_())
        outputs.float().square().mean().backward()
        module.zero_grad(set_to_none=True)

    return step


def evaluate(module: nn.Module, tokens: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """Return a function that runs one forward pass in evaluation mode, without gradients."""

    def step() -> None:
        module.eval()
        kind = tokens.device.type
        with torch.inference_mode(), torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            module(tokens)

    return step


def seconds(steps: list[Callable[[], None]], repeats: int, device: torch.device) -> list[float]:
    """Return the median seconds of each step, measured alternately."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for step, into in zip(steps, found, strict=True):
            wait(device)
            started = clock()
            step()
            wait(device)
            if turn:  # The first turn warms up.
                into.append(clock() - started)
    return [statistics.median(times) for times in found]


def wait(device: torch.device) -> None:
    """Wait until all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=192)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16", action="store_true", help="run under autocast, as the engine does if possible"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{torch.__version__}, {device}, {torch.get_num_threads()} threads, {vars(options)}")
    torch.manual_seed(0)
    layers = make_layers(options.features, options.experts, options.top_k, options.tokens)
    tokens = torch.randn(options.images, options.tokens, options.features, device=device)
    for name, pair in layers.items():
        for kind, make in (("training", train_step), ("evaluation", evaluate)):
            steps = [make(module.to(device), tokens, options.bf16) for module in pair]
            layer, dense = seconds(steps, options.repeats, device)
            row = f"{1e3 * layer:8.1f} ms  dense {1e3 * dense:8.1f} ms  ratio {layer / dense:.2f}"
            print(f"{name:14} {kind:10} {row}", flush=True)


if __name__ == "__main__":
    main()
