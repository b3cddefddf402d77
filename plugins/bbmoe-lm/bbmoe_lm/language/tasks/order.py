"""The task `order`: which of four names comes first or last in the alphabet."""

from __future__ import annotations

import torch
from torch import Generator

from bbmoe_lm.language.tasks.choice import LETTERS, Choice, options, question

NAMES = (
    *("adam", "bella", "carl", "dora", "emil", "fay", "gus", "hana"),
    *("ivan", "jack", "kate", "liam", "mona", "nils", "olga", "paul"),
)
ENDS = {"first": min, "last": max}


class Order(Choice):
    """The letter of the name that comes first or last in the alphabet.

    Query: `which comes first : a kate b carl c paul d dora .` (13 tokens). Answer: `b` (1 token).
    """

    name = "order"
    words = (*NAMES, *ENDS, *LETTERS, "which", "comes", ":", ".")

    query_tokens = 13

    def queries(self, generator: Generator, n: int) -> list[str]:
        ends = list(ENDS)
        asked = torch.randint(len(ends), (n,), generator=generator).tolist()
        chosen = torch.rand(n, len(NAMES), generator=generator).argsort(dim=1)[:, : len(LETTERS)].tolist()
        return [
            question(f"which comes {ends[end]}", [NAMES[name] for name in row])
            for end, row in zip(asked, chosen, strict=True)
        ]

    def letter(self, query: str) -> str:
        text, listed = options(query)
        return ENDS[text.split()[-1]](listed, key=listed.__getitem__)
