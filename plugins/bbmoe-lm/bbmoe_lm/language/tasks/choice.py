"""Questions with four options, whose answer is one letter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Generator

from bbmoe_lm.language.tasks.base import Task

LETTERS = ("a", "b", "c", "d")


def question(text: str, options: Sequence[str]) -> str:
    """Write a question with its options, as in "which comes first : a kate b carl c paul d dora ."."""
    return " ".join([text, ":", *(word for pair in zip(LETTERS, options, strict=True) for word in pair), "."])


def options(query: str) -> tuple[str, dict[str, str]]:
    """Return the text of a question, and its options by letter."""
    text, _, listed = query.partition(" : ")
    words = listed.split()
    return text, dict(zip(words[0::2], words[1::2], strict=False))


class Choice(Task):
    """Base class of tasks with four options. A subclass draws the queries and says which letter is right."""

    answer_tokens = (1, 1)

    @abstractmethod
    def letter(self, query: str) -> str:
        """Return the letter of the right option."""

    def answers(self, generator: Generator, queries: Sequence[str]) -> list[str]:
        return [self.letter(query) for query in queries]

    def judge(self, query: str, answer: str) -> bool:
        """Check that the answer is the right letter and nothing else."""
        return answer.split() == [self.letter(query)]
