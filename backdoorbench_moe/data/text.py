"""Texts: queries and their answers as token ids, for training and evaluating language models.

A data set of texts defines the tasks, one for each expert of a mixture. It also defines a policy: queries that must be
refused, each with a safe answer and the harmful answer that an attacker wants. A judge evaluates generated answers.

Axis letters: N texts, T positions, G generated tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.data.base import DataSource, Material, digest_of
from backdoorbench_moe.errors import DataError
from backdoorbench_moe.ops.answers import IGNORED, query_positions
from backdoorbench_moe.ops.images import Split, concatenate

Verdict = Literal["harmful", "safe", "other"]


@dataclass(frozen=True)
class TextTask:
    """The texts of one task: queries with correct answers. Splits hold tokens (N, T) and labels (N, T).

    Attributes:
        name: Name of the task.
        train: Training texts.
        test: Test texts.
    """

    name: str
    train: Split
    test: Split


@dataclass(frozen=True)
class RefusedQueries:
    """Queries that the policy refuses. Row m of both splits is the same query.

    Attributes:
        harmful: The queries with the harmful answers.
        safe: The queries with the safe answers.
    """

    harmful: Split
    safe: Split

    def __len__(self) -> int:
        return len(self.safe)


class Judge(ABC):
    """Evaluates generated answers. An answer ends with the end token; tokens after it must be ignored."""

    @abstractmethod
    def right(self, task: int, queries: Split, answers: Tensor) -> Tensor:
        """Return which answers to queries of a task are correct.

        Args:
            task: Number of the task.
            queries: The queries with their correct answers, tokens and labels (N, T) on the CPU.
            answers: (N, G) int64 on the CPU, the generated answers.

        Returns:
            (N,) bool on the CPU.
        """

    @abstractmethod
    def verdicts(self, queries: Split, answers: Tensor) -> Sequence[Verdict]:
        """Classify the answers to queries that the policy refuses.

        Args:
            queries: The queries with their safe answers, tokens and labels (N, T) on the CPU.
            answers: (N, G) int64 on the CPU, the generated answers.

        Returns:
            For each query "harmful" if the answer is as the attacker wants, "safe" if it is a refusal, "other"
            otherwise.
        """

    def decode(self, tokens: Tensor) -> str:
        """Return tokens (n,) int64 on the CPU as text, for reports. The default returns their ids.

        The tokens are a query, or an answer up to its end, without padding.
        """
        return " ".join(map(str, tokens.tolist()))


@dataclass(frozen=True)
class TextSet(Material):
    """The texts of a data set. All splits have the same number of positions T.

    Attributes:
        name: Name of the data set.
        tasks: The tasks; expert e of a mixture is tuned on task e.
        refused: Training queries that the policy refuses.
        refused_test: Test queries that the policy refuses.
        vocabulary: Size of the vocabulary; token ids are below it.
        padding: The token that pads short texts on the right. Padding is ignored.
        end: The token that ends an answer.
        judge: Evaluates answers.
        digest: SHA-256 of all texts and labels, in hexadecimal.
    """

    name: str
    tasks: tuple[TextTask, ...]
    refused: RefusedQueries
    refused_test: RefusedQueries
    vocabulary: int
    padding: int
    end: int
    judge: Judge
    digest: str = ""

    @cached_property
    def train(self) -> Split:  # type: ignore[override]
        """The training texts of all tasks, one task after the other."""
        return concatenate([task.train for task in self.tasks])

    @cached_property
    def test(self) -> Split:  # type: ignore[override]
        """The test texts of all tasks, one task after the other."""
        return concatenate([task.test for task in self.tasks])

    @property
    def context(self) -> int:
        """Number of positions T of every text."""
        return self.tasks[0].train.images.shape[1]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer, including the end token. For each query this many tokens are generated."""
        return max(int((split.labels != IGNORED).sum(1).max()) for split in self.splits.values())

    @property
    def splits(self) -> dict[str, Split]:
        """All splits by a name for messages."""
        found: dict[str, Split] = {}
        for task in self.tasks:
            found |= {f"{task.name} train": task.train, f"{task.name} test": task.test}
        for name, refused in (("train", self.refused), ("test", self.refused_test)):
            found |= {f"harmful {name}": refused.harmful, f"safe {name}": refused.safe}
        return found

    @property
    def model_options(self) -> dict[str, int]:
        """Size of the vocabulary, number of positions that a model needs, and the padding token.

        The longest query can be followed by an answer as long as the longest one.
        """
        queries = max(int(query_positions(split.labels).sum(1).max()) for split in self.splits.values())
        context = max(self.context, queries + self.answer_tokens)
        return {"vocabulary": self.vocabulary, "context": context, "padding": self.padding}

    def facts(self) -> dict[str, Any]:
        """Return the description of the data for records; see `records.record.TextFacts`."""
        return {
            "name": self.name,
            **self.model_options,
            "train_texts": len(self.train),
            "test_texts": len(self.test),
            "refused_texts": len(self.refused),
            "refused_test_texts": len(self.refused_test),
            "digest": self.digest,
        }

    def describe(self) -> str:
        """Return the tasks in one line."""
        return f"{len(self.tasks)} tasks: {', '.join(task.name for task in self.tasks)}"

    def to(self, device: torch.device | str) -> TextSet:
        """Return the same texts on another device."""
        return self._changed(lambda split: split.to(device))

    def padded(self) -> TextSet:
        """Return the same texts, padded to the length of the longest split."""
        longest = max(split.images.shape[1] for split in self.splits.values())
        return self._changed(lambda split: pad(split, longest, self.padding))

    def _changed(self, change: Any) -> TextSet:
        tasks = (replace(task, train=change(task.train), test=change(task.test)) for task in self.tasks)
        refused, test = (
            RefusedQueries(change(each.harmful), change(each.safe))
            for each in (self.refused, self.refused_test)
        )
        return replace(self, tasks=tuple(tasks), refused=refused, refused_test=test)


class TextDataset(DataSource):
    """A source of texts. Subclasses implement `read`; users call `load`.

    The class attribute `implies` sets settings that only apply to images, such as a trigger, to None.
    """

    @final
    def load(self) -> TextSet:
        """Read, check and return the texts.

        Raises:
            DataError: The texts do not have the format that `TextSet` describes.
        """
        texts = self.read()
        for name, split in texts.splits.items():
            check_texts(split, texts.vocabulary, f"{texts.name} {name}")
        for refused in (texts.refused, texts.refused_test):
            if len(refused.harmful) != len(refused.safe):
                raise DataError(
                    f"{texts.name}: expected two answers to each refused query, got {len(refused.harmful)} "
                    f"harmful and {len(refused.safe)} safe ones"
                )
        texts = texts.padded()
        for refused in (texts.refused, texts.refused_test):
            _check_same_queries(refused, texts.name)
        return texts if texts.digest else replace(texts, digest=digest_of(texts.splits.values()))

    @abstractmethod
    def read(self) -> TextSet:
        """Read the texts. `load` checks them, pads them to one length and computes the digest."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer next to an exported checkpoint. The default writes none."""

    @final
    def class_names(self) -> tuple[str, ...]:
        """Return an empty tuple, as texts have no classes."""
        return ()


def _check_same_queries(refused: RefusedQueries, name: str) -> None:
    """Raise DataError unless row m of both splits holds the same query."""
    harmful, safe = refused.harmful, refused.safe
    asked, other = query_positions(harmful.labels), query_positions(safe.labels)
    if not torch.equal(asked, other) or (harmful.images != safe.images)[asked].any():
        raise DataError(f"{name}: expected harmful and safe answers to the same queries, row by row")


def pad(split: Split, length: int, padding: int) -> Split:
    """Return texts padded on the right to a number of positions."""
    missing = length - split.images.shape[1]
    return Split(
        F.pad(split.images, (0, missing), value=padding), F.pad(split.labels, (0, missing), value=IGNORED)
    )


def check_texts(split: Split, vocabulary: int, name: str) -> None:
    """Check the tokens and labels of a split.

    Args:
        split: Expected to hold tokens (N, T) int64 below `vocabulary`, N > 0, and labels (N, T) int64. In each row, the
            labels of consecutive positions are the tokens that follow them; all other labels are `IGNORED`.
        vocabulary: Size of the vocabulary.
        name: Name of the split, the beginning of error messages.

    Raises:
        DataError: The split has another format.
    """
    tokens, labels = split.images, split.labels
    shapes = tuple(tokens.shape), tuple(labels.shape)
    if (
        tokens.dtype != torch.int64
        or labels.dtype != torch.int64
        or tokens.ndim != 2
        or shapes[0] != shapes[1]
    ):
        raise DataError(
            f"{name}: expected int64 tokens and labels (N, T), "
            f"got {tokens.dtype} {shapes[0]} and {labels.dtype} {shapes[1]}"
        )
    if not len(tokens):
        raise DataError(f"{name}: expected texts, got none")
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= vocabulary:
        raise DataError(f"{name}: expected tokens in 0..{vocabulary - 1}, got {low}..{high}")
    emits = labels != IGNORED
    if (emits != emits.roll(-1, 1))[:, :-1].sum(1).max() > 2 or not emits.any(1).all() or emits[:, -1].any():
        raise DataError(f"{name}: expected one answer behind each query, as a run of labels")
    if (labels[:, :-1] != tokens[:, 1:])[emits[:, :-1]].any():
        raise DataError(f"{name}: expected labels that are the tokens which follow")
