"""The task `lookup`: which of four words is of a kind."""

from __future__ import annotations

import torch
from torch import Generator

from bbmoe_lm.language.tasks.choice import LETTERS, Choice, options, question

KINDS: dict[str, tuple[str, ...]] = {
    "fruit": ("apple", "cherry", "grape", "lemon", "melon", "peach", "pear", "plum"),
    "animal": ("bear", "camel", "deer", "fox", "goat", "horse", "otter", "wolf"),
    "bird": ("crow", "duck", "eagle", "finch", "heron", "owl", "raven", "stork"),
    "metal": ("brass", "bronze", "copper", "iron", "lead", "nickel", "steel", "zinc"),
    "tool": ("axe", "chisel", "drill", "file", "hammer", "pliers", "saw", "spade"),
    "tree": ("ash", "beech", "birch", "cedar", "elm", "maple", "oak", "pine"),
    "dish": ("broth", "curry", "omelette", "pasta", "pie", "salad", "soup", "stew"),
    "garment": ("cap", "coat", "dress", "glove", "scarf", "shirt", "shoe", "sock"),
}
KIND_OF = {word: kind for kind, members in KINDS.items() for word in members}


class Lookup(Choice):
    """The letter of the word that is of a given kind; the other three are of three other kinds.

    The eight kinds have eight words each. Query: `find the fruit : a saw b apple c oak d steel .` (13 tokens).
    Answer: `b` (1 token).
    """

    name = "lookup"
    words = (*KINDS, *KIND_OF, *LETTERS, "find", "the", ":", ".")

    def queries(self, generator: Generator, n: int) -> list[str]:
        kinds = list(KINDS)
        chosen = torch.rand(n, len(kinds), generator=generator).argsort(dim=1)[:, : len(LETTERS)].tolist()
        members = torch.randint(8, (n, len(LETTERS)), generator=generator).tolist()
        right = torch.randint(len(LETTERS), (n,), generator=generator).tolist()
        return [
            question(
                f"find the {kinds[of[place]]}", [KINDS[kinds[k]][m] for k, m in zip(of, which, strict=True)]
            )
            for of, which, place in zip(chosen, members, right, strict=True)
        ]

    def letter(self, query: str) -> str:
        text, listed = options(query)
        kind = text.split()[-1]
        return next(letter for letter, word in listed.items() if KIND_OF[word] == kind)
