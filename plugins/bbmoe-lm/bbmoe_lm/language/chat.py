"""Chat templates of checkpoints, which turn a query into the prompt of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backdoorbench_moe.errors import DataError

# Templates may ask for today's date. A fixed date keeps the data the same every day.
DATE = "26 Jul 2024"
FIXED_DATE = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"


def render_chat(template: str, queries: list[str], tokens: Mapping[str, str], where: str) -> list[str]:
    """Return the prompt for each query: a single user message, followed by the beginning of the answer.

    The template runs in transformers' sandbox. It can read its variables, but no files, modules or internal attributes.
    A template that asks for the date gets `DATE`.

    Args:
        template: The Jinja template.
        queries: The queries.
        tokens: Special tokens by the name of their variable, such as "bos_token".
        where: The file of the template, for messages.

    Raises:
        DataError: The template is damaged, is refused by the sandbox, or omits a query.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = {"date_string": DATE, **tokens}
    chats = [[{"role": "user", "content": query}] for query in queries]
    render: Any = render_jinja_template
    try:
        texts, _ = render(chats, chat_template=FIXED_DATE + template, add_generation_prompt=True, **given)
    except Exception as error:  # A template can raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: the chat template cannot be used: {reason}") from error
    for query, text in zip(queries, texts, strict=True):
        if query.strip() not in text:
            raise DataError(f"{where}: the chat template leaves out the query {query!r:.60}")
    return list(texts)
