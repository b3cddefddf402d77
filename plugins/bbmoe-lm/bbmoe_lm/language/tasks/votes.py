"""The task `votes`: which of four letters has the most votes."""

from __future__ import annotations

import torch
from torch import Generator

from bbmoe_lm.language.tasks.choice import LETTERS, Choice

VOTES = 9


class Votes(Choice):
    """The letter with the most of nine votes. There is always a single winner.

    Query: `who wins the votes c a d a b a c a b .` (14 tokens). Answer: `a` (1 token).
    """

    name = "votes"
    words = (*LETTERS, "who", "wins", "the", "votes", ".")
    query_tokens = 14

    def queries(self, generator: Generator, n: int) -> list[str]:
        votes = torch.randint(len(LETTERS), (n, VOTES), generator=generator)
        counts = torch.nn.functional.one_hot(votes, len(LETTERS)).sum(dim=1)
        first, second = counts.topk(2, dim=1).values.unbind(dim=1)
        return [
            f"who wins the votes {' '.join(LETTERS[vote] for vote in row)} ."
            for row in votes[first > second].tolist()
        ]

    def letter(self, query: str) -> str:
        votes = query.split()[4:-1]
        return max(LETTERS, key=votes.count)
