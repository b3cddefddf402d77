"""The task `sums`: long addition, column by column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator

from bbmoe_lm.language.tasks.base import Task, sentences

DIGITS = tuple("0123456789")
COLUMNS = 3
LOW, HIGH = 10 ** (COLUMNS - 1), 10**COLUMNS


class Sums(Task):
    """Addition of two three-digit numbers from right to left, with all carries.

    Query: `add 4 7 2 plus 3 5 9 .` (9 tokens). Answer: `2 plus 9 plus 0 is 1 carry 1 . 7 plus 5 plus 1 is 3 carry
    1 . 4 plus 3 plus 1 is 8 carry 0 . total 8 3 1 .` (35 or 36 tokens, 35.6 on average).
    """

    name = "sums"
    words = (*DIGITS, "add", "plus", "is", "carry", "total", ".")
    query_tokens = 9
    answer_tokens = (35, 36)

    def queries(self, generator: Generator, n: int) -> list[str]:
        pairs = torch.randint(LOW, HIGH, (n, 2), generator=generator).tolist()
        return [f"add {' '.join(str(a))} plus {' '.join(str(b))} ." for a, b in pairs]

    def answers(self, generator: Generator, queries: Sequence[str]) -> list[str]:
        return [_work_out(*_numbers(query)) for query in queries]

    def judge(self, query: str, answer: str) -> bool:
        """Return whether every column follows from the query and the previous carry, and the total is correct."""
        left, right = _numbers(query)
        written = sentences(answer)
        if len(written) != COLUMNS + 1:
            return False
        *columns, total = written
        carry = 0
        for column, a, b in zip(columns, reversed(left), reversed(right), strict=True):
            quotient, remainder = divmod(int(a) + int(b) + carry, 10)
            if column != [a, "plus", b, "plus", str(carry), "is", str(remainder), "carry", str(quotient)]:
                return False
            carry = quotient
        return total == ["total", *str(int(left) + int(right))]


def _numbers(query: str) -> tuple[str, str]:
    """Return the two numbers of a query as strings, such as "472" and "359"."""
    left, _, right = query.removeprefix("add ").removesuffix(" .").partition(" plus ")
    return left.replace(" ", ""), right.replace(" ", "")


def _work_out(left: str, right: str) -> str:
    """Return the answer with all steps, from two numbers as strings."""
    columns: list[str] = []
    total: list[str] = []
    carry = 0
    for a, b in zip(reversed(left), reversed(right), strict=True):
        before, (carry, digit) = carry, divmod(int(a) + int(b) + carry, 10)
        columns.append(f"{a} plus {b} plus {before} is {digit} carry {carry} .")
        total.insert(0, str(digit))
    if carry:
        total.insert(0, str(carry))
    return f"{' '.join(columns)} total {' '.join(total)} ."
