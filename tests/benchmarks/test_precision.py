"""The precision script: overlap by hand, and a whole run of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY_MODEL

from backdoorbench_moe.api import attack

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def precision(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("precision_script", SCRIPTS / "precision.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "precision_script", module)
    spec.loader.exec_module(module)
    return module


def test_jaccard_by_hand(precision) -> None:
    first = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    second = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    torch.testing.assert_close(precision.jaccard(first, second), torch.tensor([1 / 3, 1.0, 1.0]))


@pytest.mark.parametrize("model", [TINY_MODEL, {"name": "wide_resnet", "widen_factor": 1}])
def test_a_run_gets_a_row_of_each_kind(precision, tmp_path, monkeypatch, capsys, model) -> None:
    [run] = attack(
        model=model,
        trigger="square",
        applicator="image",
        dataset="tiny",
        recipe="paper",
        output=tmp_path,
        train={"epochs": 1, "batch_size": 32},
    )
    monkeypatch.setattr(sys, "argv", ["precision.py", *map(str, tmp_path.glob("*/"))])
    precision.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 + 1  # The header; the attack's two rows; its twin's one.
    assert all(line.count("|") == 8 for line in lines)
    [clean] = [line for line in lines if run.folder.path.name in line and "| BA |" in line]
    same, overlap = (cell.strip() for cell in clean.split("|")[6:8])
    assert 0 <= float(same) <= 100
    assert overlap == "–" if model["name"] == "wide_resnet" else 0 < float(overlap) <= 100
