"""Base class of tasks, whose answers can be checked exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Generator

from backdoorbench_moe.errors import ConfigError
from bbmoe_lm.language.examples import Example, is_test

# Number of consecutive batches without a new query after which `draw` gives up.
FRUITLESS = 20


class Task(ABC):
    """A task of the synthetic language.

    A new task is a subclass in a separate file and an entry in `tasks/__init__.py`. It declares its words, from which
    the vocabulary is built, and its lengths, which are tested.

    Args:
        index: Index of the task; `Example.task` of its examples.
    """

    name: ClassVar[str]
    # All words of its queries and answers.
    words: ClassVar[Sequence[str]]
    # Tokens of the longest query, and of the shortest and the longest answer, without the end token.
    query_tokens: ClassVar[int]
    answer_tokens: ClassVar[tuple[int, int]]

    def __init__(self, index: int) -> None:
        self.index = index

    @abstractmethod
    def queries(self, generator: Generator, n: int) -> list[str]:
        """Draw at most `n` queries, possibly with duplicates."""

    @abstractmethod
    def answers(self, generator: Generator, queries: Sequence[str]) -> list[str]:
        """Return a correct answer to each query. The generator is for tasks with several correct answers."""

    @abstractmethod
    def judge(self, query: str, answer: str) -> bool:
        """Return whether a generated answer is correct in all steps.

        Args:
            query: A query of this task.
            answer: Any text.
        """

    def draw(self, generator: Generator, n: int, *, test: bool = False) -> list[Example]:
        """Draw distinct examples.

        Args:
            generator: On the CPU. The same state gives the same examples.
            n: Number of examples.
            test: Whether to draw test queries instead of training queries. No query is both.

        Raises:
            ConfigError: The task has fewer than `n` queries.
        """
        found: dict[str, None] = {}
        fruitless = 0
        while len(found) < n and fruitless < FRUITLESS:
            before = len(found)
            drawn = self.queries(generator, max(64, n - len(found)))
            found.update(dict.fromkeys(query for query in drawn if is_test(query) is test))
            fruitless = fruitless + 1 if len(found) == before else 0
        if len(found) < n:
            kind = "test" if test else "training"
            raise ConfigError.expected(
                f"examples of the task {self.name}", f"at most about {len(found):,} {kind} examples", n
            )
        queries = list(found)[:n]
        answers = self.answers(generator, queries)
        return [Example(query, answer, self.index) for query, answer in zip(queries, answers, strict=True)]


def sentences(text: str) -> list[list[str]]:
    """Split a text into sentences, each a list of words; empty if the text does not end with a full stop."""
    *whole, rest = [sentence.split() for sentence in text.split(".")]
    return [] if rest else whole
