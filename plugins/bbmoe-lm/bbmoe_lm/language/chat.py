"""Chat templates of checkpoints: how a query stands in the text that a model is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backdoorbench_moe.errors import DataError

# Templates may ask for today's date; texts that change from day to day would be other data every day.
DATE = "26 Jul 2024"
FIXED_DATE = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"


def render_chat(template: str, queries: list[str], tokens: Mapping[str, str], where: str) -> list[str]:
    """Return each query as the only message of a user, with the beginning of the answer behind it.

    The template runs in transformers' sandbox: it can read what it is given, but reach no file, module or attribute
    behind it. A template that asks for the date is given `DATE`.

    Args:
        template: The template, in the language of Jinja.
        queries: The queries.
        tokens: Special tokens that the template may name, such as "bos_token".
        where: The file of the template, for messages.

    Raises:
        DataError: The template is damaged, is refused by the sandbox, or leaves a query out.
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
