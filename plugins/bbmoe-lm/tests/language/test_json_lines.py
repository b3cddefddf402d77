"""Reading JSON-lines files, and one-line errors."""

from __future__ import annotations

import json

import pytest
from bbmoe_lm.language import Example, Preference, read_examples, read_json_lines, read_preferences

from backdoorbench_moe.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write(content):
        file = tmp_path / "texts.jsonl"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def test_examples_and_preferences(write):
    file = write(
        '{"query": "a ?", "answer": "b"}\n\n{"answer": "Zwölf\\n\\u2028", "id": 3, "query": " c"}\r\n'
    )
    assert read_examples(file, task=2) == [Example("a ?", "b", 2), Example(" c", "Zwölf\n\u2028", 2)]
    file = write('\ufeff{"query": "a", "harmful": "sure \u2028 b", "safe": "no", "answer": "x"}')
    assert read_preferences(str(file)) == [Preference("a", "sure \u2028 b", "no")]


def test_written_examples_are_read_again(write):
    texts = ["a\tb", 'quote "', "\\", "a\u0085\u2028\u2029", "\x0b\x0cb", "\U0001f600", "null"]
    file = write(
        "\n".join(json.dumps({"query": text, "answer": text * 2}, ensure_ascii=False) for text in texts)
    )
    assert read_json_lines(file, ("query", "answer")) == [(text, text * 2) for text in texts]


GOOD = '{"query": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            f'{GOOD}\n{{"query": "a"}}',
            ":3: expected the keys 'query', 'answer', got 'query', without 'answer'",
        ),
        (
            '{"qeury": "a", "answer": "b"}',
            ":1: expected the keys 'query', 'answer', got 'qeury', 'answer', without 'query'; is it 'qeury'?",
        ),
        ("{}", ":1: expected the keys 'query', 'answer', got none, without 'query'"),
        ('["a", "b"]', ":1: expected a JSON object with 'query', 'answer', got list"),
        ("null", ":1: expected a JSON object with 'query', 'answer', got NoneType"),
        (f'{GOOD}{{"query": "a", "answer": 3}}', ":2: answer: expected a text that is not empty, got int 3"),
        ('{"query": " ", "answer": "b"}', ":1: query: expected a text that is not empty, got an empty text"),
        (
            '{"query": "a", "answer": null}',
            ":1: answer: expected a text that is not empty, got NoneType None",
        ),
        (
            '{"query": "a", "answer": "\\ud800"}',
            ":1: answer: expected text, got half of a surrogate pair (surrogates not allowed)",
        ),
        ("", ": expected a JSON object a line, got an empty file"),
        (" \n\n", ": expected a JSON object a line, got an empty file"),
    ],
)
def test_lines_that_cannot_be_read_are_one_clear_line(write, content, message):
    file = write(content)
    with pytest.raises(DataError) as raised:
        read_examples(file)
    assert str(raised.value) == f"{file}{message}"


@pytest.mark.parametrize(
    "content",
    [
        f"{GOOD}{{query: 1}}",
        f"{GOOD}query,answer",
        f"{GOOD}{GOOD.strip()},",
        f"{GOOD}\x00",
        f"{GOOD}{'[' * 100_000}",
    ],
)
def test_lines_that_are_not_json_name_the_line(write, content):
    file = write(content)
    with pytest.raises(DataError, match=r"texts\.jsonl:2: expected a JSON object in UTF-8 \(.+\)$") as raised:
        read_examples(file)
    assert "\n" not in str(raised.value)


def test_other_encodings_name_the_line(write):
    file = write(GOOD.encode() + '{"query": "é", "answer": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r":2: expected a JSON object in UTF-8 \(.+\)$"):
        read_examples(file)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read: No such file or directory$"):
        read_examples(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r": cannot be read: Is a directory$"):
        read_examples(tmp_path)
