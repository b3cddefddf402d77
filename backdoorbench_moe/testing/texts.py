"""A small mixture of language models and a defense task for it, for the conformance tests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import PartSpec, TrainSpec
from backdoorbench_moe.defenses.base import NEEDS, DefenseTask
from backdoorbench_moe.moe.layers import ignored
from backdoorbench_moe.moe.merging import MergedModel, expert_names
from backdoorbench_moe.ops.answers import IGNORED
from backdoorbench_moe.ops.images import Split, concatenate
from backdoorbench_moe.ops.seeding import generator, seeded
from backdoorbench_moe.testing.making import make_task
from backdoorbench_moe.testing.mixtures import DENSE, EXPERTS, merge

PADDING, END, VOCABULARY, CONTEXT = 0, 1, 11, 9
FEATURES, LAYERS = 12, 2


class MLP(nn.Module):
    """An MLP that can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(FEATURES, 2 * FEATURES), nn.GELU()
        self.fc2 = nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.fc2(self.act(self.fc1(tokens)))


class SmallLanguageModel(nn.Module):
    """A language model in which every position uses the mean over itself and all previous positions."""

    data_options = ("vocabulary", "context", "padding")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, FEATURES)
        self.blocks = nn.ModuleList(MLP() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, vocabulary)."""
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).unsqueeze(1)
        states = self.embed(tokens)
        with ignored(tokens == PADDING):
            for block in self.blocks:
                states = states + block(self.norm(states + states.cumsum(1) / counts))
        return self.head(self.norm(states))

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLP of each block."""
        return {f"blocks.{number}": block for number, block in enumerate(self.blocks)}


def build_text_mixture(*, gate: str = "top-k", seed: int = 0) -> MergedModel:
    """Build a mixture of two untrained language models, which differ from their base."""
    with seeded(seed, "init"):
        dense = SmallLanguageModel()
    experts = []
    for number in range(EXPERTS):
        draws = generator(seed, "expert", number)
        state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        for name in sorted(expert_names(dense)):
            state[name] += 0.1 * torch.randn(state[name].shape, generator=draws)
        experts.append(state)
    return merge(dense, experts, gate=gate, seed=seed)


def text_split(count: int, seed: int, answer: int = 2, *, salt: int = 0) -> Split:
    """Draw queries of 2 to 4 tokens, with answers of a fixed number of tokens and the end token.

    Args:
        count: Number of texts.
        seed: Seed of the queries.
        answer: Number of tokens of an answer, without the end token.
        salt: Another value gives other answers to the same queries.
    """
    draws, other = generator(seed, "queries"), generator(seed, "answers", salt)
    tokens = torch.full((count, CONTEXT), PADDING)
    labels = torch.full((count, CONTEXT), IGNORED)
    for row in range(count):
        length = 2 + row % 3
        query = torch.randint(2, VOCABULARY, (length,), generator=draws)
        said = torch.randint(2, VOCABULARY, (answer,), generator=other)
        whole = torch.cat([query, said, torch.tensor([END])])
        tokens[row, : len(whole)] = whole
        labels[row, length - 1 : len(whole) - 1] = whole[length:]
    return Split(tokens, labels)


def make_text_task(
    model: nn.Module,
    *,
    needs: Collection[str] = NEEDS,
    gate: str = "top-k",
    clean: Split | None = None,
    seed: int = 7,
    **recipe: Any,
) -> tuple[DefenseTask, list[tuple[str, dict[str, Tensor]]]]:
    """Create a task for a defense of a mixture of language models; see `mixtures.make_mixture_task`.

    Args:
        model: The mixture.
        needs: What the task grants, see `Defense.needs`.
        gate: Name of the mixture's gate.
        clean: The defender's clean texts; by default those of all tasks.
        seed: Seed of the defense.
        **recipe: Fields of the training settings of experts and gates; AdamW by default.
    """
    tasks = [text_split(12, 4), text_split(12, 5)]
    grants: dict[str, Any] = {
        "clean": concatenate(tasks) if clean is None else clean,
        "marked": text_split(12, 3, answer=1),
        "tasks": tasks,
    }
    recipe = {"optimizer": "adamw", "lr": 0.01, **recipe}
    task, reported = make_task(model, PartSpec(DENSE), needs=needs, seed=seed, **recipe)
    granted = {need: grants.get(need, given) for need, given in task.granted.items()}
    if "marked" in granted:
        granted["unsafe"] = text_split(12, 3, answer=4, salt=1)
    return (
        replace(
            task,
            num_classes=0,
            image_size=0,
            gate_train=TrainSpec(**{**recipe, "lr": 0.05}),
            fresh=partial(build_text_mixture, gate=gate, seed=seed + 1),
            granted=granted,
        ),
        reported,
    )
