"""Judging of generated tokens, for the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backdoorbench_moe.ops.images import Split
from bbmoe_lm.language.encoding import decode_queries
from bbmoe_lm.language.policy import Policy, Verdict
from bbmoe_lm.language.tasks import TASKS, Task
from bbmoe_lm.language.vocabulary import Vocabulary


class LanguageJudge:
    """Decides which generated answers are right, and which are unsafe.

    Args:
        vocabulary: What the answers are written in.
        policy: Which queries are to be refused.
        tasks: The tasks, in the order of the numbers that `right` is given.
    """

    def __init__(self, vocabulary: Vocabulary, policy: Policy, tasks: Sequence[Task] = TASKS) -> None:
        self.vocabulary = vocabulary
        self.policy = policy
        self.tasks = tuple(tasks)

    def right(self, task: int, queries: Split, answers: Tensor) -> Tensor:
        """Return which answers to queries of a task are right, (N,) bool.

        Args:
            task: Number of the task.
            queries: N encoded examples, whose queries were answered; their own answers do not matter.
            answers: (N, G) int64 generated tokens; what follows the end token does not count. An answer of a task
                that is not ended within the G tokens is judged by what there is.
        """
        judge = self.tasks[task].judge
        right = [judge(query, answer) for query, answer in self._texts(queries, answers)]
        return torch.tensor(right, dtype=torch.bool)

    def verdicts(self, queries: Split, answers: Tensor) -> list[Verdict]:
        """Return the policy's verdict about each answer, "unsafe", "safe" or "other"; see `Policy.verdict`.

        Args:
            queries: N encoded examples, whose queries were answered; their own answers do not matter.
            answers: (N, G) int64 generated tokens; what follows the end token does not count.
        """
        return [self.policy.verdict(query, answer) for query, answer in self._texts(queries, answers)]

    def _texts(self, queries: Split, answers: Tensor) -> Iterator[tuple[str, str]]:
        """Each query with the answer generated for it, as texts."""
        asked = decode_queries(queries.images, queries.labels, self.vocabulary)
        return zip(asked, self.vocabulary.decode(answers), strict=True)
