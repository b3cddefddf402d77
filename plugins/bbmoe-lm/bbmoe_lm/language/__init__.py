"""Texts for language models: the synthetic language with its tasks, policy and judges, and own texts, as token ids."""

from __future__ import annotations

from bbmoe_lm.language.encoding import (
    IGNORED,
    EncodedText,
    decode_answers,
    decode_queries,
    encode,
    encode_preferences,
    query_lengths,
)
from bbmoe_lm.language.examples import Example, Preference, is_test
from bbmoe_lm.language.json_lines import read_examples, read_json_lines, read_preferences
from bbmoe_lm.language.judging import LanguageJudge, ReferenceJudge
from bbmoe_lm.language.policy import Policy, Verdict
from bbmoe_lm.language.synthetic import synthetic_vocabulary
from bbmoe_lm.language.tasks import GENERAL, TASKS, Task
from bbmoe_lm.language.vocabulary import Vocabulary

__all__ = [
    "GENERAL",
    "IGNORED",
    "TASKS",
    "EncodedText",
    "Example",
    "LanguageJudge",
    "Policy",
    "Preference",
    "ReferenceJudge",
    "Task",
    "Verdict",
    "Vocabulary",
    "decode_answers",
    "decode_queries",
    "encode",
    "encode_preferences",
    "is_test",
    "query_lengths",
    "read_examples",
    "read_json_lines",
    "read_preferences",
    "synthetic_vocabulary",
]
