"""A tokenizer with its special tokens: padding, end and unknown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.wording.spelling import near_names

PAD, END, UNKNOWN = "[pad]", "[end]", "[unk]"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer of the `tokenizers` library and its special tokens.

    Args:
        tokenizer: Any tokenizer without padding and truncation. `of_words` creates one with a token for each word.
        pad: Padding id, used on the right of short texts. May equal `end`.
        end: Id of the token after an answer.
        unknown: Id of unknown words; None if the tokenizer has none.
    """

    tokenizer: Tokenizer
    pad: int
    end: int
    unknown: int | None = None

    @classmethod
    def of_words(cls, words: Iterable[str]) -> Vocabulary:
        """Create a vocabulary with a token for each word. The ids depend on the set of words, not on their order.

        Args:
            words: Words without white space; the special tokens are added before them.
        """
        tokens = [PAD, END, UNKNOWN, *sorted(set(words) - {PAD, END, UNKNOWN})]
        ids = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return cls(tokenizer, ids[PAD], ids[END], ids[UNKNOWN])

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [found.ids for found in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the text of each row of token ids, up to the first end token and without padding.

        Args:
            tokens: (N, T) int64 on any device. Tokens after the end token are ignored.
        """
        rows = []
        for row in tokens.tolist():
            text = row[: row.index(self.end)] if self.end in row else row
            rows.append([token for token in text if token != self.pad])
        return self.tokenizer.decode_batch(rows, skip_special_tokens=False)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text, split at white space, that are not in the vocabulary."""
        words = text.split()
        return [word for word, ids in zip(words, self.ids(words), strict=True) if self.unknown in ids]

    def check_words(self, words: Sequence[str], parameter: str = "policy words") -> None:
        """Check that words are in the vocabulary.

        Raises:
            ConfigError: A word is not. The message names words with a similar spelling.
        """
        for word in words:
            if self.unknown_words(word):
                near = near_names(word, sorted(self.tokenizer.get_vocab()))
                advice = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ConfigError(f"{parameter}: expected words of the vocabulary, got {word!r}{advice}")
