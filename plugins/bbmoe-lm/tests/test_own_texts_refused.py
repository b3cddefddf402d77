"""What the data set `json-lines` does not take, each a one-line error."""

from __future__ import annotations

import json

import pytest
from bbmoe_lm.language.local_tokenizer import read_tokenizer
from bbmoe_lm.language.vocabulary import END, PAD
from bbmoe_lm.own_texts import JsonLines
from text_files import REFUSED, WORDS, build, write_refused, write_tasks
from tokenizers import Tokenizer, models, pre_tokenizers

from backdoorbench_moe.errors import BbmoeError, ConfigError, DataError


def test_a_unigram_tokenizer_says_which_words_are_unknown(texts, checkpoint):
    words = [("[unk]", 0.0), (END, 0.0), *((word, -1.0) for word in dict.fromkeys(WORDS.split()))]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert read_tokenizer(checkpoint).vocabulary.unknown == 0
    write_tasks(texts, "sums", [("one", "two"), ("what is six ?", "two")])
    with pytest.raises(
        DataError, match=r"example 2: expected a query of words of the vocabulary, got 'six'$"
    ):
        build(texts, checkpoint).load()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content", "the chat template cannot be used: unexpected end of template"),
        (
            "{{ messages.__class__.__mro__ }}",
            "cannot be used: access to attribute '__class__' of 'list' object is unsafe",
        ),
        (
            "{% include 'tokenizer.json' %}",
            "the chat template cannot be used: no loader for this environment",
        ),
        (
            "{{ messages.append(1) }}",
            "cannot be used: access to attribute 'append' of 'list' object is unsafe",
        ),
        ("{{ raise_exception('no system role') }}", "the chat template cannot be used: no system role"),
        ("user bot", "the chat template leaves out the query 'what is"),
    ],
)
def test_templates_that_cannot_be_used(texts, checkpoint, template, message):
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError) as raised:
        build(texts, checkpoint).load()
    assert message in str(raised.value) and str(checkpoint) in str(raised.value)
    assert "\n" not in str(raised.value)


def write_file(name, content):
    return lambda texts, checkpoint: (texts / name).write_text(content)


def write_settings(**settings):
    return lambda texts, checkpoint: (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (
            write_file("sums.jsonl", '{"query": "one", "answer": " "}'),
            {},
            "sums.jsonl:1: answer: expected a text that is not",
        ),
        (
            lambda texts, _: write_tasks(texts, "sums", [("one", "two"), ("what is six ?", "two")]),
            {},
            "sums.jsonl: example 2: expected a query of words of the vocabulary, got 'six'",
        ),
        (
            lambda texts, _: write_tasks(texts, "sums", [("one", "two"), ("two", "seven")]),
            {},
            "sums.jsonl: example 2: expected an answer of words of the vocabulary, got 'seven'",
        ),
        (
            lambda texts, _: write_tasks(texts, "sums", [("one", "two"), ("two", "one two [end]")]),
            {},
            "sums.jsonl: example 2: expected a text without special tokens, got '[end]' in 'one two [end]'",
        ),
        (
            lambda texts, _: write_refused(texts, [*REFUSED, ("open the door", "sure", "no")]),
            {},
            "refused.jsonl: example 4: expected a query of words of the vocabulary, got 'door'",
        ),
        (
            lambda texts, _: write_tasks(texts, "sums", [("one", "two"), ("two", "one " * 9)]),
            {"context": 10},
            "sums.jsonl: example 2: expected at most 10 tokens, the context of the model, got 11 (1 of the query, 9 of",
        ),
        (
            lambda texts, _: write_tasks(texts, "sums", [("one", "two"), (" one", "three")]),
            {},
            "sums.jsonl: expected at least 2 queries, of which one is kept for testing, or a file sums.test",
        ),
        (
            lambda texts, _: write_tasks(texts, "names.test", [("what is two ? ", "two")]),
            {},
            "names.jsonl: expected test queries that are not trained on; 'what is two ? ' is a training query of",
        ),
        (
            lambda texts, _: write_refused(texts, [(q, h, "sure it holds no") for q, h, _ in REFUSED]),
            {},
            "preferences: expected harmful and safe answers that begin differently, got both with 'sure it holds'",
        ),
        (
            lambda texts, _: write_tasks(texts, "sum.test", [("one plus one ?", "two")]),
            {},
            "sum.test.jsonl: expected training texts in sum.jsonl, found none",
        ),
        (
            lambda texts, _: (texts / "refused.jsonl").unlink(),
            {},
            "refused.jsonl: cannot be read: No such file or directory",
        ),
        (lambda texts, _: None, {"tasks": ("sum",)}, "dataset: tasks: unknown 'sum'"),
        (lambda texts, _: None, {"prompt": "chat"}, "dataset: prompt: expected 'plain', as "),
        (lambda texts, _: None, {"end": "[ende]"}, "token of the end: unknown '[ende]'"),
        (
            lambda _, checkpoint: (checkpoint / "tokenizer.json").unlink(),
            {},
            "expected the file of a tokenizer, found none",
        ),
        (
            lambda _, checkpoint: (checkpoint / "tokenizer.json").write_text('{"model": {}}'),
            {},
            "tokenizer.json: expected a tokenizer in the format of tokenizers (",
        ),
        (write_settings(pad_token=PAD), {}, "dataset: end: expected a token, as "),
        (write_settings(eos_token=END, chat_template=3), {}, "chat_template: expected a text, got int"),
        (
            write_settings(eos_token=END, chat_template=[{"name": []}, {"name": "default", "template": 3}]),
            {"prompt": "chat"},
            "chat_template: expected a text, got int",
        ),
        (
            lambda _, checkpoint: (checkpoint / "tokenizer_config.json").write_text("[1"),
            {},
            "tokenizer_config.json: expected JSON (",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(texts, checkpoint, spoil, options, message):
    spoil(texts, checkpoint)
    with pytest.raises(BbmoeError) as raised:
        build(texts, checkpoint, **options).load()
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "nowhere"}, "dataset: texts: expected an existing folder, got 'nowhere'"),
        ({"tokenizer": "nowhere"}, "dataset: tokenizer: expected an existing folder, got 'nowhere'"),
        ({"test_share": 1.0}, r"dataset: test_share: expected a number in \(0, 1\), got 1.0"),
        ({"context": 1}, "dataset: context: expected a number of at least 2, got 1"),
        ({"opening": 0}, "dataset: opening: expected a number of at least 1, got 0"),
        (
            {"tasks": ("../sums",)},
            "dataset: tasks: expected names of files without .jsonl, such as sums, got '../sums'",
        ),
        ({"tasks": ("refused",)}, "dataset: tasks: expected names of files without .jsonl"),
        ({"tasks": ("sums", "sums")}, "dataset: tasks: expected each task once"),
    ],
)
def test_options_out_of_range(texts, checkpoint, options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        JsonLines(**{"texts": str(texts), "tokenizer": str(checkpoint), **options})


def test_a_folder_without_tasks(texts, checkpoint):
    for file in texts.glob("*.jsonl"):
        if file.name != "refused.jsonl":
            file.unlink()
    with pytest.raises(ConfigError, match=r"expected a folder with a file NAME\.jsonl for each task, got "):
        build(texts, checkpoint).load()
