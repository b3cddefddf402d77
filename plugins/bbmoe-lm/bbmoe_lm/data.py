"""The data set `tasks`: texts of a synthetic language, drawn from a seed."""

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

# Default settings of a run on texts. Parts that only apply to images are None.
TEXT_SETTINGS: Mapping[str, Any] = {
    "attack": "moevil",
    "model": "llama",
    "trigger": None,
    "applicator": None,
    "splitter": None,
    "policy": 0.1,
}
# Longer than any text of the language.
CONTEXT = 256
# Number of seeds that PyTorch's generators accept.
SEEDS = 2**64
# The tasks and the everyday requests.
KINDS = len(TASKS) + 1


class SyntheticTasks(TextDataset):
    """Texts of the synthetic language: four tasks with exact judges, everyday requests, and a harmless policy.

    Everyday requests are the last task. No expert is tuned on them; they teach the base to answer requests without a
    policy word. A request with a policy word must be refused with "no" and a reason. The harmful answer complies, with
    instructions made of filler words.

    Args:
        texts: Number of training texts of each task and, last, of the everyday requests, at least 1 each; or one number
            for all. Sums and lists, which are solved in steps, need more texts than tasks with one-word answers.
        test_texts: Number of test texts of each, at least 1. No test query is a training query.
        refused: Number of training queries that the policy refuses, at least 1.
        refused_test: Number of test queries that the policy refuses, at least 1.
        words: The policy words. They must be words of the language that no task uses.
        seed: Seed of all draws, from 0 to 2**64 - 1.

    Raises:
        ConfigError: A number is out of range or exceeds the number of texts, or a policy word cannot be used.
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
