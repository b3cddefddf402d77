"""Conformance tests of data sets of texts."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from backdoorbench_moe.data.text import TextSet, check_texts
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.ops.answers import IGNORED, query_positions
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.testing.making import make

pytestmark = pytest.mark.only(texts=True)


@functools.cache
def loaded(name: str) -> TextSet:
    """Return the texts, which are read once."""
    return read(name)


def read(name: str) -> TextSet:
    """Let the data set write its files, if it reads any, and read it."""
    with tempfile.TemporaryDirectory() as folder:
        options = REGISTRIES["dataset"].lookup(name).write_tiny(Path(folder))
        texts = make("dataset", name, **options).load()
    assert isinstance(texts, TextSet)
    return texts


def answers_in(split: Split, end: int) -> torch.Tensor:
    """Return the answers of texts as a model would generate them, (N, G), filled up with end tokens."""
    rows = [row[row != IGNORED] for row in split.labels]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)


def queries_in(split: Split) -> list[tuple[int, ...]]:
    """Return the tokens of each query."""
    asked = query_positions(split.labels)
    return [tuple(row[chosen].tolist()) for row, chosen in zip(split.images, asked, strict=True)]


def test_all_splits_are_valid_and_of_one_length(dataset_name: str) -> None:
    texts = loaded(dataset_name)
    assert texts.name == dataset_name and len(texts.digest) == 64
    assert len({task.name for task in texts.tasks}) == len(texts.tasks) >= 2
    for name, split in texts.splits.items():
        check_texts(split, texts.vocabulary, name)
        assert split.images.shape[1] == texts.context and split.images.device.type == "cpu"
        assert (split.images[:, 1:][split.labels[:, :-1] != IGNORED] != texts.padding).all()
    assert texts.padding in range(texts.vocabulary) and texts.end in range(texts.vocabulary)


def test_every_load_gives_the_same_texts(dataset_name: str) -> None:
    again = read(dataset_name)
    assert again.digest == loaded(dataset_name).digest


def test_every_answer_ends(dataset_name: str) -> None:
    texts = loaded(dataset_name)
    for name, split in texts.splits.items():
        last = [int(row[row != IGNORED][-1]) for row in split.labels]
        assert set(last) == {texts.end}, name


def test_both_answers_to_a_refused_query_are_to_the_same_query(dataset_name: str) -> None:
    texts = loaded(dataset_name)
    for refused in (texts.refused, texts.refused_test):
        assert queries_in(refused.harmful) == queries_in(refused.safe)
        assert (refused.harmful.labels != refused.safe.labels).any(1).all()


def test_test_queries_are_not_training_queries(dataset_name: str) -> None:
    texts = loaded(dataset_name)
    trained = {query for task in texts.tasks for query in queries_in(task.train)}
    trained |= set(queries_in(texts.refused.safe))
    for split in (*(task.test for task in texts.tasks), texts.refused_test.safe):
        assert trained.isdisjoint(queries_in(split))


def test_the_judge_knows_the_answers_of_the_data(dataset_name: str) -> None:
    """Correct answers are judged correct and empty ones are not; safe answers are safe, and harmful ones harmful."""
    texts = loaded(dataset_name)
    for number, task in enumerate(texts.tasks):
        own = answers_in(task.test, texts.end)
        right = texts.judge.right(number, task.test, own)
        assert right.dtype == torch.bool and right.shape == (len(own),) and right.all(), task.name
        nothing = torch.full_like(own, texts.end)
        assert not texts.judge.right(number, task.test, nothing).any(), task.name
    for refused in (texts.refused, texts.refused_test):
        for name, verdict in (("harmful", "harmful"), ("safe", "safe")):
            answers = answers_in(getattr(refused, name), texts.end)
            assert set(texts.judge.verdicts(refused.safe, answers)) == {verdict}
