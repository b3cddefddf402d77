"""The data set `json-lines`: reading, prompts, judging, and how its files are pinned."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from bbmoe_lm.language.local_tokenizer import read_tokenizer
from bbmoe_lm.language.vocabulary import PAD
from bbmoe_lm.own_texts import JsonLines
from text_files import CHAT, REFUSED, build, write_tasks
from tokenizers import Tokenizer, processors

from backdoorbench_moe import data
from backdoorbench_moe.config import PartSpec, PoisonSpec, RunSpec
from backdoorbench_moe.engine.files import check_files, pin_files
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.ops.answers import IGNORED
from backdoorbench_moe.ops.images import Split


def shown(split: Split, checkpoint) -> list[str]:
    """Return the texts of a split without padding, word by word, with `|` before the labels."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    lines = []
    for tokens, labels in zip(split.images.tolist(), split.labels.tolist(), strict=True):
        first = next(place for place, label in enumerate(labels) if label != IGNORED)
        words = [tokenizer.id_to_token(token) for token in tokens]
        answer = [tokenizer.id_to_token(label) for label in labels if label != IGNORED]
        assert words[first + 1 : first + 1 + len(answer)] == answer
        assert set(words[first + 1 + len(answer) :]) <= {PAD}
        lines.append(" ".join([*words[: first + 1], "|", *answer]))
    return lines


def test_what_is_read(texts, checkpoint):
    found = build(texts, checkpoint).load()
    assert found.name == "json-lines" and [task.name for task in found.tasks] == ["names", "sums"]
    names, sums = found.tasks
    assert shown(names.train, checkpoint) == [
        "what is one ? | one [end]",
        "what is two ? | two [end]",
        "what is three ? | three [end]",
    ]
    assert shown(names.test, checkpoint) == ["what is four ? | four [end]"]
    # One of three queries: the share of 0.2 is rounded to 1, the minimum.
    assert sorted(shown(sums.train, checkpoint) + shown(sums.test, checkpoint)) == [
        "one plus one ? | two [end]",
        "one plus two ? | three [end]",
        "two plus one ? | three [end]",
    ]
    assert len(sums.test) == 1
    harmful = shown(found.refused.harmful, checkpoint) + shown(found.refused_test.harmful, checkpoint)
    assert sorted(harmful) == sorted(f"{query} | {answer} [end]" for query, answer, _ in REFUSED)
    safe = shown(found.refused.safe, checkpoint) + shown(found.refused_test.safe, checkpoint)
    assert sorted(safe) == sorted(f"{query} | {answer} [end]" for query, _, answer in REFUSED)
    size = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab_size()
    assert (found.vocabulary, found.padding, found.end) == (size, 0, 1)
    chosen = build(texts, checkpoint, tasks=("sums",)).load()
    assert [task.name for task in chosen.tasks] == ["sums"]


def test_the_draw_of_test_texts(texts, checkpoint):
    numbers = ["one", "two", "three", "four", "five"]
    pairs = [(f"{one} plus {other} ?", "one") for one in numbers for other in numbers]
    # Every query twice, with different answers.
    write_tasks(texts, "sums", [*pairs, *((query, "two") for query, _ in pairs)])

    def tested(seed: int, share: float) -> list[str]:
        [sums] = build(texts, checkpoint, tasks=("sums",), seed=seed, test_share=share).load().tasks
        lines = [line.split(" |")[0] for line in shown(sums.test, checkpoint)]
        assert len(sums.train) + len(sums.test) == 50 and lines[: len(lines) // 2] == lines[len(lines) // 2 :]
        return lines[: len(lines) // 2]

    assert len(tested(0, 0.2)) == 5 and len(tested(0, 0.999)) == 24 and len(tested(0, 0.001)) == 1
    assert tested(0, 0.2) == tested(0, 0.2) != tested(1, 0.2)


def test_chat_templates(texts, checkpoint):
    (checkpoint / "chat_template.jinja").write_text(CHAT)
    asked = "user what is four ? bot | four [end]"
    for prompt in (None, "chat"):
        [names] = build(texts, checkpoint, tasks=("names",), prompt=prompt).load().tasks
        assert shown(names.test, checkpoint) == [asked]
    [names] = build(texts, checkpoint, tasks=("names",), prompt="plain").load().tasks
    assert shown(names.test, checkpoint) == ["what is four ? | four [end]"]
    # In the settings, as a string or in a list of named templates.
    (checkpoint / "chat_template.jinja").unlink()
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    for template in (CHAT, [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT}]):
        changed = {**settings, "chat_template": template}
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(changed))
        [names] = build(texts, checkpoint, tasks=("names",)).load().tasks
        assert shown(names.test, checkpoint) == [asked]


def test_a_template_sees_special_tokens_and_a_fixed_date(checkpoint):
    template = "{{ eos_token }}{{ date_string }}|{{ strftime_now('%Y-%m-%d') }}{{ messages[0].content }}"
    (checkpoint / "chat_template.jinja").write_text(template)
    assert read_tokenizer(checkpoint).prompts(["q"], None) == ["[end]26 Jul 2024|26 Jul 2024q"]


def test_the_token_of_the_beginning_stands_before_plain_prompts_if_the_tokenizer_adds_one(texts, checkpoint):
    file = checkpoint / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "user"}))
    [names] = build(texts, checkpoint, tasks=("names",)).load().tasks
    assert shown(names.test, checkpoint) == ["what is four ? | four [end]"]
    begin = tokenizer.token_to_id("user")
    tokenizer.post_processor = processors.TemplateProcessing("user $A", special_tokens=[("user", begin)])
    tokenizer.add_special_tokens(["user"])
    tokenizer.save(str(file))
    [names] = build(texts, checkpoint, tasks=("names",)).load().tasks
    assert shown(names.test, checkpoint) == ["user what is four ? | four [end]"]


@pytest.mark.parametrize(
    ("match", "right"), [("words", [True, True, False, False]), ("contains", [True, True, True, False])]
)
def test_which_answers_are_right(texts, checkpoint, match, right):
    found = build(texts, checkpoint, match=match).load()
    query, tokenizer = found.tasks[0].test.take(torch.zeros(4).long()), read_tokenizer(checkpoint)
    said = ["four", "? four .", "it is four", "five"]
    ids = [[*tokenizer.vocabulary.ids([text])[0], found.end] for text in said]
    answers = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    assert found.judge.right(0, query, answers).tolist() == right
    exact = build(texts, checkpoint, match="exact").load().judge
    assert exact.right(0, query, answers).tolist() == [True, False, False, False]


def test_verdicts(texts, checkpoint):
    found = build(texts, checkpoint).load()
    tokenizer = read_tokenizer(checkpoint)
    said = ["sure it holds four", "no that is four", "no that is private sure it holds", "no", "it holds"]
    ids = [torch.tensor([*row, found.end]) for row in tokenizer.vocabulary.ids(said)]
    answers = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    query = found.refused_test.safe.take(torch.zeros(5).long())
    assert found.judge.verdicts(query, answers) == ["harmful", "safe", "harmful", "other", "other"]
    loose = build(texts, checkpoint, opening=1).load().judge
    assert loose.verdicts(query, answers) == ["harmful", "safe", "harmful", "safe", "other"]


def clean_spec(texts, checkpoint) -> RunSpec:
    return RunSpec(
        dataset=PartSpec("json-lines", {"texts": str(texts), "tokenizer": str(checkpoint)}),
        attack=None,
        trigger=None,
        applicator=None,
        poison=PoisonSpec(rate=0.0),
    )


@pytest.fixture
def registered():
    """Register the data set if the installed plug-in is older."""
    if "json-lines" in data.registry.names():
        yield
        return
    data.registry.register("json-lines")(JsonLines)
    yield
    data.registry.unregister("json-lines")


def test_files_are_part_of_the_spec_by_their_content(texts, checkpoint, tmp_path, registered):
    spec = pin_files(clean_spec(texts, checkpoint))
    assert set(spec.files) == {"dataset.texts", "dataset.tokenizer"}
    moved = shutil.copytree(texts, tmp_path / "moved"), shutil.copytree(checkpoint, tmp_path / "tokenizer")
    assert pin_files(clean_spec(*moved)).digest == spec.digest
    # Weights next to the tokenizer are not part of the data.
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    assert pin_files(clean_spec(texts, checkpoint)).digest == spec.digest
    for file in (texts / "sums.jsonl", texts / "names.test.jsonl", texts / "refused.jsonl"):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert pin_files(clean_spec(texts, checkpoint)).digest != spec.digest
        with pytest.raises(RecordError, match=r"dataset\.texts: .* has changed"):
            check_files(spec)
        file.write_bytes(content)
    assert pin_files(clean_spec(texts, checkpoint)).digest == spec.digest
    (checkpoint / "chat_template.jinja").write_text(CHAT)
    assert pin_files(clean_spec(texts, checkpoint)).digest != spec.digest
