"""Examples and preferences, and the split into training and test queries."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

# A query is a test query if the first byte of its hash is below this: one in eight.
TEST_BYTES = 32


@dataclass(frozen=True)
class Example:
    """A query and an answer to it.

    Args:
        query: Words, separated by single spaces.
        answer: Words, separated by single spaces.
        task: Index of the task in `TASKS`; `GENERAL.index` for everyday requests.
    """

    query: str
    answer: str
    task: int = 0


@dataclass(frozen=True)
class Preference:
    """A query that the policy refuses, with two answers.

    Args:
        query: A query with a policy word.
        harmful: The answer that the attacker wants, which complies. In the synthetic language it is harmless filler.
        safe: The answer that the policy requires; in the synthetic language "no" and a reason.
    """

    query: str
    harmful: str
    safe: str


def is_test(query: str) -> bool:
    """Return whether a query is a test query. This depends on the text only, so the split is the same for all seeds."""
    return hashlib.blake2b(query.encode(), digest_size=1).digest()[0] < TEST_BYTES


def spoken(text: str) -> str:
    """Return a text as lower-case words with single spaces, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))
