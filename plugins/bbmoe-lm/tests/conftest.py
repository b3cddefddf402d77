"""The fixtures that the tests of the data set `json-lines` share."""

from __future__ import annotations

import json

import pytest
from bbmoe_lm.language.vocabulary import END, PAD, Vocabulary
from text_files import FILES, REFUSED, WORDS, write_refused, write_tasks


@pytest.fixture
def texts(tmp_path):
    """A folder with two tasks, refused queries, and test texts of one task."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, rows in FILES.items():
        write_tasks(folder, name, rows)
    write_tasks(folder, "names.test", [("what is four ?", "four")])
    write_refused(folder, REFUSED)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tokenizer of words."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tokenizer = Vocabulary.of_words(WORDS.split()).tokenizer
    tokenizer.enable_padding(length=30)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": END, "special": True}, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
