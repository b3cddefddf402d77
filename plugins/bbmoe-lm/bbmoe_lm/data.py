"""The data set `tasks`: the synthetic language, drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from backdoorbench_moe.data.text import RefusedQueries, TextDataset, TextSet, TextTask
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import Split
from bbmoe_lm.language import (
    GENERAL,
    TASKS,
    EncodedText,
    LanguageJudge,
    Policy,
    Task,
    encode,
    encode_preferences,
    synthetic_vocabulary,
)
from bbmoe_lm.language.policy import PRIVATE

# Settings that a run on texts has unless others are given. The parts that only images have are left out.
TEXT_SETTINGS: Mapping[str, Any] = {
    "attack": "moevil",
    "model": "llama",
    "trigger": None,
    "applicator": None,
    "splitter": None,
    "policy": 0.1,
}
# More than the longest text of the language.
CONTEXT = 256
# Seeds that PyTorch's generators take.
SEEDS = 2**64
# Tasks, and everyday requests.
KINDS = len(TASKS) + 1


class SyntheticTasks(TextDataset):
    """Texts of the synthetic language: four tasks with exact judges, everyday requests, and a harmless policy.

    Everyday requests come last among the tasks: they are no expert's task, but show the base that a request without a
    policy word is answered. A request with a policy word is to be refused with "no" and a reason; the harmful answer is
    one that complies, made of filler.

    Args:
        texts: Training texts of each task and, last, of the everyday requests, at least 1 each; or one number for all.
            Sums and lists are worked out in steps, and take more texts to learn than tasks with one-word answers.
        test_texts: Test texts of each, at least 1. No test query is a training query.
        refused: Training queries that the policy refuses, at least 1.
        refused_test: Test queries that the policy refuses, at least 1.
        words: The policy words. They must be words of the language that no task uses.
        seed: Seed of all draws, from 0 to 2**64 - 1.

    Raises:
        ConfigError: A number is out of range, there are not so many texts, or a policy word is not in the vocabulary.
    """

    implies: ClassVar[Mapping[str, Any]] = TEXT_SETTINGS
    tiny: ClassVar[Mapping[str, object]] = {"texts": 16, "test_texts": 6, "refused": 12, "refused_test": 6}

    def __init__(
        self,
        *,
        texts: int | tuple[int, ...] = (6000, 4000, 2000, 2000, 500),
        test_texts: int = 100,
        refused: int = 1500,
        refused_test: int = 100,
        words: tuple[str, ...] = PRIVATE,
        seed: int = 0,
    ) -> None:
        self.texts = (texts,) * KINDS if isinstance(texts, int) else texts
        if len(self.texts) != KINDS:
            raise ConfigError.expected("dataset: texts", f"one number, or a list of {KINDS}", texts)
        numbers = {
            "texts": min(self.texts),
            "test_texts": test_texts,
            "refused": refused,
            "refused_test": refused_test,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError.expected(f"dataset: {name}", "a number of at least 1", value)
        if not 0 <= seed < SEEDS:
            raise ConfigError.expected("dataset: seed", f"an integer in 0..{SEEDS - 1}", seed)
        self.test_texts = test_texts
        self.refused, self.refused_test = refused, refused_test
        self.words, self.seed = words, seed

    def read(self) -> TextSet:
        """Draw the texts."""
        vocabulary, policy, tasks = synthetic_vocabulary(), Policy(self.words), (*TASKS, GENERAL)
        policy.check(vocabulary, tasks)
        draws = torch.Generator().manual_seed(self.seed)

        def drawn(task: Task, count: int, *, test: bool) -> Split:
            return _split(encode(task.draw(draws, count, test=test), vocabulary, CONTEXT))

        def refused(count: int, *, test: bool) -> RefusedQueries:
            pairs = policy.draw(draws, count, test=test)
            return RefusedQueries(*map(_split, encode_preferences(pairs, vocabulary, CONTEXT)))

        return TextSet(
            name="tasks",
            tasks=tuple(
                TextTask(
                    task.name,
                    drawn(task, count, test=False),
                    drawn(task, self.test_texts, test=True),
                )
                for task, count in zip(tasks, self.texts, strict=True)
            ),
            refused=refused(self.refused, test=False),
            refused_test=refused(self.refused_test, test=True),
            vocabulary=len(vocabulary),
            padding=vocabulary.pad,
            end=vocabulary.end,
            judge=LanguageJudge(vocabulary, policy, tasks),
        )


def _split(encoded: EncodedText) -> Split:
    return Split(encoded.tokens, encoded.labels)
