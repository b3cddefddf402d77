"""Reading folders of JSON-lines files, splitting them into training and test texts, and encoding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.seeding import generator
from bbmoe_lm.language.encoding import EncodedText, encode, encode_preferences
from bbmoe_lm.language.examples import Example, Preference
from bbmoe_lm.language.json_lines import read_examples, read_preferences
from bbmoe_lm.language.local_tokenizer import LocalTokenizer, Prompt

SUFFIX, TEST = ".jsonl", ".test.jsonl"

Rows = Sequence[Example] | Sequence[Preference]


@dataclass(frozen=True)
class Part:
    """The training or test texts of a file.

    Attributes:
        rows: The texts.
        splits: The texts as token ids: one split for examples; for preferences one split with the harmful and one with
            the safe answers.
    """

    rows: Rows
    splits: tuple[Split, ...]


@dataclass(frozen=True)
class TextFiles:
    """The files of a folder, read with a tokenizer.

    Attributes:
        folder: The folder.
        tokenizer: The tokenizer.
        prompt: Format of the prompts; see `LocalTokenizer.prompts`.
        context: Maximum number of tokens of a text.
        test_share: Share of the queries of a file that is drawn for testing, in (0, 1).
        seed: Seed of the draw.
    """

    folder: Path
    tokenizer: LocalTokenizer
    prompt: Prompt | None
    context: int
    test_share: float
    seed: int

    def examples(self, name: str) -> tuple[Part, Part]:
        """Read the training and the test texts of a task. Raises DataError."""
        return self._parts(name, read_examples)

    def preferences(self, name: str) -> tuple[Part, Part]:
        """Read the training and the test queries with two answers each. Raises DataError."""
        return self._parts(name, read_preferences)

    def _parts(self, name: str, read: Callable[[Path], Rows]) -> tuple[Part, Part]:
        file, other = self.folder / f"{name}{SUFFIX}", self.folder / f"{name}{TEST}"
        rows = read(file)
        encoded = self._encode(rows, file)
        if other.exists():
            test = read(other)
            return Part(rows, encoded), Part(test, self._encode(test, other))
        chosen = self._drawn([row.query for row in rows], file)
        return _taken(rows, encoded, ~chosen), _taken(rows, encoded, chosen)

    def _drawn(self, queries: Sequence[str], file: Path) -> torch.Tensor:
        """Draw test queries, (N,) bool; texts with the same query are not separated."""
        distinct = {query: place for place, query in enumerate(dict.fromkeys(map(str.strip, queries)))}
        if len(distinct) < 2:
            raise DataError(
                f"{file}: expected at least 2 queries, of which one is kept for testing, or a file "
                f"{file.stem}{TEST}; got {len(distinct)}"
            )
        count = min(max(1, round(self.test_share * len(distinct))), len(distinct) - 1)
        order = torch.randperm(len(distinct), generator=generator(self.seed, "test", file.stem))
        kept = set(order[:count].tolist())
        return torch.tensor([distinct[query.strip()] in kept for query in queries])

    def _encode(self, rows: Rows, file: Path) -> tuple[Split, ...]:
        """Encode texts; messages name the file and the number of the text, from 1."""
        for number, row in enumerate(rows, start=1):
            for text in vars(row).values():
                self._check_text(text, f"{file}: example {number}")
        prompts = self.tokenizer.prompts([row.query for row in rows], self.prompt)
        vocabulary = self.tokenizer.vocabulary
        examples = [
            Example(p, row.answer) for p, row in zip(prompts, rows, strict=True) if isinstance(row, Example)
        ]
        pairs = [
            Preference(p, row.harmful, row.safe)
            for p, row in zip(prompts, rows, strict=True)
            if isinstance(row, Preference)
        ]
        try:
            if examples:
                return (_split(encode(examples, vocabulary, self.context)),)
            harmful, safe = encode_preferences(pairs, vocabulary, self.context)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        return _split(harmful), _split(safe)

    def _check_text(self, text: object, where: str) -> None:
        for token in self.tokenizer.special:
            if isinstance(text, str) and token in text:
                raise DataError(
                    f"{where}: expected a text without special tokens, got {token!r} in {text!r:.60}"
                )


def check_apart(parts: Iterable[tuple[str, Part, Part]]) -> None:
    """Check that no test query is a training query of the same or another file.

    Args:
        parts: The name, training texts and test texts of each file.

    Raises:
        DataError: A test query is a training query.
    """
    parts = list(parts)
    trained = {row.query.strip(): name for name, train, _ in parts for row in train.rows}
    for name, _, test in parts:
        for row in test.rows:
            if (other := trained.get(row.query.strip())) is not None:
                raise DataError(
                    f"{name}{SUFFIX}: expected test queries that are not trained on; {row.query!r:.60} is "
                    f"a training query of {other}{SUFFIX}"
                )


def _taken(rows: Rows, splits: tuple[Split, ...], chosen: torch.Tensor) -> Part:
    places = chosen.nonzero().squeeze(1)
    return Part([rows[place] for place in places.tolist()], tuple(split.take(places) for split in splits))


def _split(encoded: EncodedText) -> Split:
    return Split(encoded.tokens, encoded.labels)
