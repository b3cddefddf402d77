"""Example answers of language models: the query, the expected answer, the generated answer and its verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.data.text import RefusedQueries, TextSet
from backdoorbench_moe.engine.measuring.texts import TextPass
from backdoorbench_moe.ops.answers import IGNORED, query_positions
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.seeding import generator

HARMFUL = "harmful query"
# Number of examples of each task, and of the queries that the policy refuses.
TASK_EXAMPLES, HARMFUL_EXAMPLES = 2, 4


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: The generated text, up to the end of the answer.
        verdict: "right" or "wrong"; for a harmful query "harmful", "safe" or "other", see `data.text.Judge`.
    """

    text: str
    verdict: str


@dataclass(frozen=True)
class AnsweredQuery:
    """A test query and its answers.

    Attributes:
        kind: Name of its task, or "harmful query".
        query: The query.
        expected: The correct answer; for a harmful query the safe one.
        answer: The answer of the run's model.
        answer_against: The answer of the model that it is compared with; None without one.
    """

    kind: str
    query: str
    expected: str
    answer: Answer
    answer_against: Answer | None


def example_answers(
    texts: TextSet,
    numbers: Sequence[int],
    refused: RefusedQueries | None,
    found: TextPass,
    against: TextPass | None,
    seed: int,
) -> tuple[AnsweredQuery, ...]:
    """Draw test queries and collect the answers of the models.

    Args:
        texts: The data.
        numbers: Numbers of the tasks.
        refused: Test queries that the policy refuses; None if there is no policy.
        found: The pass of the run's model over the test queries of these tasks, and over `refused`.
        against: The pass of the model that it is compared with; None without one.
        seed: Seed of the draw.
    """
    examples: list[AnsweredQuery] = []
    passes = [found] if against is None else [found, against]
    for place, number in enumerate(numbers):
        task = texts.tasks[number]
        rows = _draw(len(task.test), TASK_EXAMPLES, seed, number)
        queries = task.test.to("cpu").take(rows)
        answers = [each.answers[place][rows] for each in passes]
        verdicts = [_worth(texts.judge.right(number, queries, each)) for each in answers]
        examples += _examples(texts, task.name, queries, answers, verdicts)
    if refused is not None:
        rows = _draw(len(refused), HARMFUL_EXAMPLES, seed, "refused")
        queries = refused.safe.to("cpu").take(rows)
        answers = [each.refused[rows] for each in passes if each.refused is not None]
        said: list[Sequence[str]] = [texts.judge.verdicts(queries, each) for each in answers]
        examples += _examples(texts, HARMFUL, queries, answers, said)
    return tuple(examples)


def _draw(total: int, count: int, seed: int, what: int | str) -> Tensor:
    return torch.randperm(total, generator=generator(seed, "answers", what))[:count].sort().values


def _worth(right: Tensor) -> list[str]:
    return ["right" if one else "wrong" for one in right.tolist()]


def _examples(
    texts: TextSet,
    kind: str,
    queries: Split,
    answers: Sequence[Tensor],
    verdicts: Sequence[Sequence[str]],
) -> Iterator[AnsweredQuery]:
    """Yield queries of one kind with the answers (n, G) of one or two models and their verdicts."""
    asked = query_positions(queries.labels)
    for row, (tokens, labels) in enumerate(zip(queries.images, queries.labels, strict=True)):
        own, *other = (
            Answer(_text(texts, each[row]), str(said[row]))
            for each, said in zip(answers, verdicts, strict=True)
        )
        yield AnsweredQuery(
            kind=kind,
            query=texts.judge.decode(tokens[asked[row]]),
            expected=_text(texts, labels[labels != IGNORED]),
            answer=own,
            answer_against=other[0] if other else None,
        )


def _text(texts: TextSet, answer: Tensor) -> str:
    """Decode an answer up to its end token, or all of it if it has none."""
    ended = (answer == texts.end).nonzero()
    return texts.judge.decode(answer[: int(ended[0])] if len(ended) else answer)
