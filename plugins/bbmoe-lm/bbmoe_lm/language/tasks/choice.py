"""Multiple-choice tasks, whose answer is the letter of one of four options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Generator

from bbmoe_lm.language.tasks.base import Task

LETTERS = ("a", "b", "c", "d")


class Choice(Task):
    """Base class of multiple-choice tasks. Subclasses draw the queries and determine the correct letter."""

    answer_tokens = (1, 1)

    @abstractmethod
    def letter(self, query: str) -> str:
        """Return the letter of the correct option."""

    def answers(self, generator: Generator, queries: Sequence[str]) -> list[str]:
        return [self.letter(query) for query in queries]

    def judge(self, query: str, answer: str) -> bool:
        """Return whether the answer is exactly the correct letter."""
        return answer.split() == [self.letter(query)]
