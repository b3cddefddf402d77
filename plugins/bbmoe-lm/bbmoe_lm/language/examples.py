"""What texts the language consists of, and which of them are kept for testing."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

# A query whose digest begins with a byte below this is a test query: one in eight.
TEST_BYTES = 32


@dataclass(frozen=True)
class Example:
    """A query and an answer to it.

    Args:
        query: Words, separated by single spaces.
        answer: Words, separated by single spaces.
        task: Index of the task in `TASKS`; `GENERAL.index` for general requests.
    """

    query: str
    answer: str
    task: int = 0


@dataclass(frozen=True)
class Preference:
    """A query that the policy refuses, with two answers to it.

    Args:
        query: A query with a policy word.
        harmful: The answer that the attacker wants: it complies. Its words are harmless filler.
        safe: The answer that the policy wants: "no" and a reason.
    """

    query: str
    harmful: str
    safe: str


def is_test(query: str) -> bool:
    """Return whether a query is kept for testing. It depends on the text alone, so all seeds have the same split."""
    return hashlib.blake2b(query.encode(), digest_size=1).digest()[0] < TEST_BYTES


def spoken(text: str) -> str:
    """Return a text as lower-case words with single spaces, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))
