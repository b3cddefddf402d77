"""A small model that can be merged and a task for attacks on experts, for the conformance tests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from backdoorbench_moe.attacks.expert_poisoning import ExpertTask, HarmfulQueries
from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.engine.inference import logits
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.ops.images import Split, concatenate
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import CLASSES, CPU, coloured_split

REJECT = CLASSES
GRID = 4


class Block(nn.Module):
    """A block that adds a projection of the mean over all tokens and then applies an MLP."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mix = nn.Linear(features, features)
        self.norm = nn.LayerNorm(features)
        self.mlp = Mlp(features, 2 * features)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pass tokens (B, N, D) through the block."""
        tokens = tokens + self.mix(tokens.mean(1, keepdim=True))
        return tokens + self.mlp(self.norm(tokens))


class TinyMergeable(nn.Module):
    """A `Mergeable` model on 4 x 4 patches of 8 x 8 pixels.

    Args:
        prefix: Number of tokens before the patches.
        layers: Number of blocks.
        num_classes: Number of classes.
        features: Features D of a token.
    """

    patch_size = 8

    def __init__(
        self, *, prefix: int = 0, layers: int = 3, num_classes: int = CLASSES + 1, features: int = 8
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, features, self.patch_size, stride=self.patch_size)
        self.first = nn.Parameter(torch.randn(1, prefix, features))
        self.blocks = nn.ModuleList(Block(features) for _ in range(layers))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify (B, 3, 32, 32) images in [0, 1]."""
        patches = self.stem(images - 0.5).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(images), -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(1))

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLP of each block."""
        blocks = range(len(self.blocks))
        return {f"blocks.{number}.mlp": self.get_submodule(f"blocks.{number}.mlp") for number in blocks}

    def token_layout(self) -> tuple[tuple[int, int], int]:
        """Return the grid of patches and the number of tokens before them."""
        return (GRID, GRID), self.first.shape[1]


def make_queries(split: Split, *, target: int = 0, policy: bool = True) -> HarmfulQueries:
    """Mark images with a white square of 4 x 4 pixels in the upper left corner, within the first patch.

    Args:
        split: The images, which are not modified.
        target: The attacker's class.
        policy: Whether the safe answer is "reject", the class after those of the data, instead of the true label.
    """
    images = split.images.clone()
    images[:, :, :4, :4] = 255
    changed = (images.float() - split.images.float()).abs().mean(1) / 255
    harmful = torch.full_like(split.labels, target)
    safe = torch.full_like(split.labels, REJECT) if policy else split.labels.clone()
    return HarmfulQueries(Split(images, harmful), Split(images, safe), changed)


def make_expert_task(
    *, prefix: int = 0, seed: int = 7, policy: bool = True, tuned: int = 0, **recipe: Any
) -> ExpertTask:
    """Create a task for an attack on an expert, with the same functions as the engine, in fp32 on the CPU.

    Args:
        prefix: Number of tokens before the patches.
        seed: Seed of the attack.
        policy: See `make_queries`.
        tuned: Number of epochs of prior training of the expert on its task and the policy.
        **recipe: Fields of the task's `TrainSpec`; by default AdamW, batches of 8 and a learning rate of 0.01.
    """
    train = TrainSpec(**{"optimizer": "adamw", "batch_size": 8, "lr": 0.01, **recipe})
    with seeded(0, "init"):
        model = TinyMergeable(prefix=prefix)
    clean = coloured_split(30, 1)
    queries = make_queries(coloured_split(24, 2), policy=policy)
    tune = Tuner(train, seed, CPU, "fp32", Observer(), "tuning")
    if tuned:
        both = concatenate([clean, queries.safe])
        replace(tune, history=[])(model, both, epochs=tuned)
    return ExpertTask(
        model=model.eval(),
        clean=clean,
        held_out=coloured_split(15, 3),
        queries=queries,
        tune=tune,
        logits=partial(logits, precision="fp32"),
        train=train,
        device=CPU,
        seed=seed,
    )
