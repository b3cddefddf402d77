"""The task `lookup`: the category of most of four words."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Generator

from bbmoe_lm.language.tasks.choice import LETTERS, Choice

FRUIT = "apple cherry fig grape lemon mango melon olive peach pear plum quince"
ANIMAL = "bear camel deer fox goat hare horse lion otter sheep tiger wolf"
METAL = "brass bronze chrome cobalt copper iron lead nickel pewter steel tin zinc"
TOOL = "axe chisel drill file hammer lathe pliers rake saw shovel spade wrench"
# In the order of the letters.
KINDS: dict[str, tuple[str, ...]] = {
    "fruit": tuple(FRUIT.split()),
    "animal": tuple(ANIMAL.split()),
    "metal": tuple(METAL.split()),
    "tool": tuple(TOOL.split()),
}
KIND_OF = {word: kind for kind, members in KINDS.items() for word in members}
WORDS, COMMON = 4, 3
OPTIONS = " ".join(f"{letter} {kind}" for letter, kind in zip(LETTERS, KINDS, strict=True))


class Lookup(Choice):
    """The kind that three of four words belong to; the fourth word belongs to another kind.

    The kind of a word is not in the query; it must be learned. The four kinds have twelve words each. Query:
    `most of apple saw pear plum are : a fruit b animal c metal d tool .` (17 tokens). Answer: `a` (1 token).
    """

    name = "lookup"
    words = (*KINDS, *KIND_OF, *LETTERS, "most", "of", "are", ":", ".")
    query_tokens = 17

    def queries(self, generator: Generator, n: int) -> list[str]:
        kinds = list(KINDS.values())
        # Two different kinds: that of the three words, and that of the odd word.
        pairs = torch.rand(n, len(kinds), generator=generator).argsort(dim=1)[:, :2].tolist()
        members = torch.rand(n, len(kinds[0]), generator=generator).argsort(dim=1)[:, :COMMON].tolist()
        odd = torch.randint(len(kinds[0]), (n,), generator=generator).tolist()
        places = torch.randint(WORDS, (n,), generator=generator).tolist()
        return [
            _ask([kinds[common][member] for member in row], kinds[other][odd_member], place)
            for (common, other), row, odd_member, place in zip(pairs, members, odd, places, strict=True)
        ]

    def letter(self, query: str) -> str:
        asked = query.split()[2 : 2 + WORDS]
        ((most, _),) = Counter(KIND_OF[word] for word in asked).most_common(1)
        return LETTERS[list(KINDS).index(most)]


def _ask(words: list[str], odd: str, place: int) -> str:
    """Return the query for three words of one kind with an odd word inserted at a place."""
    return f"most of {' '.join([*words[:place], odd, *words[place:]])} are : {OPTIONS} ."
