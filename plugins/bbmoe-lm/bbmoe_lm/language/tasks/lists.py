"""The task `lists`: operations on lists, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator

from bbmoe_lm.language.tasks.base import Task, sentences

ITEMS, STEPS = 4, 3
DIGITS = tuple("0123456789")
OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "reverse": lambda items: items[::-1],
    "rotate": lambda items: [*items[1:], items[0]],
    "swap": lambda items: [items[1], items[0], *items[2:]],
}


class Lists(Task):
    """Three operations on a list of four digits, with the list written down after each.

    Operations: `reverse` reverses the list, `rotate` moves its first item to the end, `swap` swaps its first two items.
    Query: `run reverse swap rotate on 4 7 2 9 .` (10 tokens). Answer: `reverse gives 9 2 7 4 . swap gives 2 9 7 4 .
    rotate gives 9 7 4 2 . result 9 7 4 2 .` (27 tokens).
    """

    name = "lists"
    words = (*DIGITS, *OPERATIONS, "run", "on", "gives", "result", ".")
    query_tokens = 10
    answer_tokens = (27, 27)

    def queries(self, generator: Generator, n: int) -> list[str]:
        names = list(OPERATIONS)
        programs = torch.randint(len(names), (n, STEPS), generator=generator).tolist()
        lists = torch.randint(10, (n, ITEMS), generator=generator).tolist()
        return [
            f"run {' '.join(names[step] for step in program)} on {' '.join(map(str, items))} ."
            for program, items in zip(programs, lists, strict=True)
        ]

    def answers(self, generator: Generator, queries: Sequence[str]) -> list[str]:
        return [_work_out(query) for query in queries]

    def judge(self, query: str, answer: str) -> bool:
        """Return whether every step names its operation and follows from the previous one, as does the result."""
        words = query.split()
        program, before = words[1 : 1 + STEPS], words[2 + STEPS : 2 + STEPS + ITEMS]
        written = sentences(answer)
        if len(written) != STEPS + 1:
            return False
        *steps, result = written
        for operation, sentence in zip(program, steps, strict=True):
            after = sentence[2:]
            if sentence[:2] != [operation, "gives"] or not _follows(operation, before, after):
                return False
            before = after
        return result == ["result", *before]


def _follows(operation: str, before: list[str], after: list[str]) -> bool:
    """Return whether an operation turns one list into another; computed independently of `OPERATIONS`."""
    if len(after) != len(before):
        return False
    last = len(before) - 1
    came_from = {
        "reverse": lambda place: last - place,
        "rotate": lambda place: (place + 1) % len(before),
        "swap": lambda place: 1 - place if place < 2 else place,
    }[operation]
    return all(item == before[came_from(place)] for place, item in enumerate(after))


def _work_out(query: str) -> str:
    """Return the answer to a query with all steps."""
    words = query.split()
    program, items = words[1 : 1 + STEPS], words[2 + STEPS : 2 + STEPS + ITEMS]
    steps = []
    for name in program:
        items = OPERATIONS[name](items)
        steps.append(f"{name} gives {' '.join(items)} .")
    return f"{' '.join(steps)} result {' '.join(items)} ."
