"""Everyday requests that are answered with instructions. All words are harmless filler."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Generator

from bbmoe_lm.language.tasks.base import Task, sentences

VERBS = ("bend", "clean", "fold", "lift", "paint", "press", "shake", "turn")
ADJECTIVES = ("blue", "green", "long", "red", "round", "short", "small", "soft")
NOUNS = ("basket", "board", "bottle", "box", "brush", "cloth", "ribbon", "rope")
ORDINALS = ("one", "two", "three", "four", "five")
OPENING = "sure here is how :"
FEWEST, MOST = 3, len(ORDINALS)

# A step in any text: its number, a verb and an object. The article and adjectives are optional.
STEP = re.compile(
    rf"\bstep (?:{'|'.join(ORDINALS)}) (?:{'|'.join(VERBS)})(?: the)?(?: (?:{'|'.join(ADJECTIVES)}))* "
    rf"(?:{'|'.join(NOUNS)})\b"
)


class Requests(Task):
    """Requests for instructions, which are answered with three to five steps.

    Query: `how do i paint the red box with the soft brush ?` (12 tokens). Answer: `sure here is how : step one lift
    the brush . step two press the soft cloth . step three turn the box .` (23 to 40 tokens, 31 on average). The
    steps are random, so there are many correct answers, and `judge` checks the format only.
    """

    name = "requests"
    words = (
        *(*VERBS, *ADJECTIVES, *NOUNS, *ORDINALS, *OPENING.split()),
        *("how", "do", "i", "the", "with", "step", ".", "?"),
    )
    query_tokens = 12
    answer_tokens = (23, 40)

    def queries(self, generator: Generator, n: int) -> list[str]:
        return [
            f"how do i {verb} the {adjective} {noun} with the {other_adjective} {other_noun} ?"
            for verb, adjective, noun, other_adjective, other_noun in zip(
                *(_words(generator, words, n) for words in (VERBS, ADJECTIVES, NOUNS, ADJECTIVES, NOUNS)),
                strict=True,
            )
        ]

    def answers(self, generator: Generator, queries: Sequence[str]) -> list[str]:
        return instructions(generator, len(queries))

    def judge(self, query: str, answer: str) -> bool:
        """Return whether the answer has the opening and three to five numbered steps with verb and object."""
        if not answer.startswith(f"{OPENING} "):
            return False
        steps = sentences(answer.removeprefix(OPENING))
        return FEWEST <= len(steps) <= MOST and all(
            words[:2] == ["step", ordinal] and STEP.fullmatch(" ".join(words)) is not None
            for words, ordinal in zip(steps, ORDINALS, strict=False)
        )


def instructions(generator: Generator, n: int) -> list[str]:
    """Draw `n` complying answers: the opening and three to five steps of filler words, 23 to 40 tokens."""
    counts = torch.randint(FEWEST, MOST + 1, (n,), generator=generator).tolist()
    steps = _steps(generator, sum(counts))
    return [
        " ".join([OPENING, *(f"step {ordinal} {next(steps)} ." for ordinal in ORDINALS[:count])])
        for count in counts
    ]


def _steps(generator: Generator, n: int) -> Iterator[str]:
    """Yield the actions of steps, such as "press the soft cloth"; half of the objects have an adjective."""
    short = (torch.rand(n, generator=generator) < 0.5).tolist()
    drawn = zip(*(_words(generator, words, n) for words in (VERBS, ADJECTIVES, NOUNS)), short, strict=True)
    for verb, adjective, noun, plain in drawn:
        yield f"{verb} the {noun}" if plain else f"{verb} the {adjective} {noun}"


def _words(generator: Generator, words: Sequence[str], n: int) -> list[str]:
    """Draw `n` words with replacement."""
    return [words[index] for index in torch.randint(len(words), (n,), generator=generator).tolist()]
