"""Reading the tokenizer of a local checkpoint in transformers' format. No code in the folder is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.models import Unigram

from backdoorbench_moe.errors import ConfigError, DataError, UnknownNameError
from bbmoe_lm.language.chat import render_chat
from bbmoe_lm.language.vocabulary import Vocabulary

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Files that belong to a tokenizer.
FILES = (TOKENIZER, SETTINGS, TEMPLATE, "special_tokens_map.json")

Prompt = Literal["chat", "plain"]


@dataclass(frozen=True)
class LocalTokenizer:
    """The tokenizer of a checkpoint and its prompt format.

    Attributes:
        folder: The folder that it was read from.
        vocabulary: The tokenizer with its padding and end tokens.
        size: Size of the vocabulary: the largest id plus one.
        tokens: The special tokens in the settings by name, such as "bos_token".
        template: The chat template; None if there is none.
        special: All special tokens as strings, which no query or answer may contain.
    """

    folder: Path
    vocabulary: Vocabulary
    size: int
    tokens: dict[str, str]
    template: str | None
    special: frozenset[str]

    def prompts(self, queries: Sequence[str], prompt: Prompt | None) -> list[str]:
        """Return the prompts for queries.

        Args:
            queries: The queries.
            prompt: "chat" for the chat template; "plain" for the query and a line feed, after the BOS token if the
                tokenizer adds one; None for the chat template if there is one, otherwise "plain".

        Raises:
            ConfigError: There is no chat template.
            DataError: The chat template cannot be used.
        """
        if prompt == "chat" and self.template is None:
            raise ConfigError.expected(
                "dataset: prompt", f"'plain', as {self.folder} has no chat template", prompt
            )
        if self.template is None or prompt == "plain":
            return [f"{self._begin()}{query}\n" for query in queries]
        return render_chat(self.template, list(queries), self.tokens, f"tokenizer: {self.folder}")

    def _begin(self) -> str:
        """Return the BOS token if the tokenizer adds it to a text, otherwise an empty string."""
        begin = self.tokens.get("bos_token", "")
        added = self.vocabulary.tokenizer.encode("", add_special_tokens=True).ids[:1]
        return begin if begin and added == [self.vocabulary.tokenizer.token_to_id(begin)] else ""


def read_tokenizer(folder: Path, end: str | None = None) -> LocalTokenizer:
    """Read a tokenizer from `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    Padding and truncation in the files are ignored.

    Args:
        folder: The folder of a checkpoint.
        end: The token that ends an answer; None for the `eos_token` of the settings.

    Raises:
        ConfigError: The end token is not given, or not in the vocabulary.
        DataError: A file is missing or damaged.
    """
    tokenizer, settings = _read_tokenizer(folder / TOKENIZER), _read_settings(folder / SETTINGS)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = {name: text for name in SPECIAL if (text := _text_of(settings.get(name))) is not None}
    ending = end if end is not None else tokens.get("eos_token")
    if ending is None:
        raise ConfigError.expected(
            "dataset: end", f"a token, as {folder / SETTINGS} names no eos_token", None
        )
    if ending not in ids:
        raise UnknownNameError(f"tokenizer: {folder}: token of the end", ending, ids)
    padding = ids.get(tokens.get("pad_token", ""), ids[ending])
    added = tokenizer.get_added_tokens_decoder().values()
    return LocalTokenizer(
        folder,
        Vocabulary(tokenizer, padding, ids[ending], _unknown_id(tokenizer)),
        1 + max(ids.values()),
        tokens,
        _read_template(folder, settings),
        frozenset(token.content for token in added if token.special) | set(tokens.values()) | {ending},
    )


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise DataError(f"tokenizer: {file}: expected the file of a tokenizer, found none")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:
        # A panic in the tokenizers library is not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"tokenizer: {file}: expected a tokenizer in the format of tokenizers ({reason})"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if not tokenizer.get_vocab_size():
        raise DataError(f"tokenizer: {file}: expected a tokenizer with tokens, got one without")
    return tokenizer


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of unknown words; None if there is none."""
    if isinstance(tokenizer.model, Unigram):  # It has no such attribute.
        found = json.loads(tokenizer.to_str())["model"].get("unk_id")
        return found if isinstance(found, int) else None
    token = getattr(tokenizer.model, "unk_token", None)
    return None if token is None else tokenizer.token_to_id(token)


def _read_settings(file: Path) -> dict[str, Any]:
    """Read the settings; empty if the file does not exist."""
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"tokenizer: {file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"tokenizer: {file}: expected JSON ({error})") from error
    if not isinstance(settings, dict):
        raise DataError(f"tokenizer: {file}: expected a JSON object, got {type(settings).__name__}")
    return settings


def _text_of(token: object) -> str | None:
    """Return a special token, given as a string or object in the settings, as a string."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Read the chat template from its file or the settings; the one named "default" if there are several."""
    file = folder / TEMPLATE
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"tokenizer: {file}: cannot be read ({error})") from error
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = (each for each in found if isinstance(each, dict) and each.get("name") == "default")
        found = next(named, {}).get("template")
    if found is not None and not isinstance(found, str):
        raise DataError(
            f"tokenizer: {folder / SETTINGS}: chat_template: expected a text, got {type(found).__name__}"
        )
    return found
