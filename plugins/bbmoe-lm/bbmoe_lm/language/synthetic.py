"""The vocabulary of the synthetic language."""

from __future__ import annotations

from bbmoe_lm.language.policy import PRIVATE, REASONS
from bbmoe_lm.language.tasks import GENERAL, TASKS
from bbmoe_lm.language.vocabulary import Vocabulary


def synthetic_vocabulary() -> Vocabulary:
    """Return the vocabulary of all tasks, everyday requests, policy words and answers."""
    words = {word for task in (*TASKS, GENERAL) for word in task.words}
    reasons = {word for reason in REASONS for word in reason.split()}
    return Vocabulary.of_words(words | reasons | set(PRIVATE))
