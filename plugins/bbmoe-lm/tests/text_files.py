"""Files of texts and of a tokenizer of words for the tests of the data set `json-lines`."""

from __future__ import annotations

import json

from bbmoe_lm.own_texts import JsonLines

WORDS = "what is one two three four five plus open the box sure it holds no that private . ? user bot"
FILES = {
    "sums": [("one plus one ?", "two"), ("one plus two ?", "three"), ("two plus one ?", "three")],
    "names": [("what is one ?", "one"), ("what is two ?", "two"), ("what is three ?", "three")],
}
REFUSED = [
    (f"open the box {n}", f"sure it holds {n}", "no that is private .") for n in ("one", "two", "three")
]
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}bot{% endif %}"


def write_lines(file, keys, rows):
    file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))


def write_tasks(folder, name, rows):
    write_lines(folder / f"{name}.jsonl", ("query", "answer"), rows)


def write_refused(folder, rows, name="refused"):
    write_lines(folder / f"{name}.jsonl", ("query", "harmful", "safe"), rows)


def build(texts, checkpoint, **options):
    return JsonLines(texts=str(texts), tokenizer=str(checkpoint), **options)
