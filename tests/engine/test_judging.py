"""Judgements about classes, measured against the attacker's classes by hand, and the arrays that a folder keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_spec

from backdoorbench_moe import defenses
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.measuring.judging import measure_class_judgements
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.engine.runner import Runner, run_defense
from backdoorbench_moe.errors import PluginError


def judged(*flagged: str, about: str = "class") -> Judgement:
    return Judgement(about, "odd", scores=dict.fromkeys(flagged, 3.0), threshold=2.0, suspicious=flagged)


def wanting(*classes: int) -> Triggered:
    labels = torch.tensor(classes)
    return Triggered(torch.arange(len(labels)), torch.zeros(len(labels), 3, 4, 4), labels, labels + 1)


def values(metrics) -> dict[str, tuple[float, int]]:
    return {name: (found["value"], found["n"]) for name, found in metrics.items()}


@pytest.mark.parametrize(
    ("flagged", "wanted", "expected"),
    [
        ((["2"],), (2, 2, 2), {"class_tpr": (100.0, 1), "class_fpr": (0.0, 9)}),
        ((["2", "5", "9"],), (2,), {"class_tpr": (100.0, 1), "class_fpr": (100 * 2 / 9, 9)}),
        (([],), (2,), {"class_tpr": (0.0, 1), "class_fpr": (0.0, 9)}),
        ((["5"],), (2,), {"class_tpr": (0.0, 1), "class_fpr": (100 / 9, 9)}),
        ((["2"], ["5", "2"]), (2,), {"class_tpr": (100.0, 1), "class_fpr": (100 / 9, 9)}),
        ((["0", "1", "2"],), tuple(range(10)), {"class_tpr": (30.0, 10)}),
        ((["5"],), None, {"class_fpr": (10.0, 10)}),
        (([],), None, {"class_fpr": (0.0, 10)}),
    ],
)
def test_shares_by_hand(flagged, wanted, expected) -> None:
    judgements = [judged(*names) for names in flagged]
    triggered = None if wanted is None else wanting(*wanted)
    assert values(measure_class_judgements(judgements, triggered, 10)) == pytest.approx(expected)


def test_other_judgements_are_not_measured() -> None:
    assert measure_class_judgements([], wanting(2), 10) == {}
    assert measure_class_judgements([judged("moe/0", about="expert")], wanting(2), 10) == {}


@pytest.mark.parametrize("name", ["10", "-1", "cat", "02"])
def test_a_class_that_does_not_exist_is_the_defenses_fault(name) -> None:
    with pytest.raises(PluginError, match=f"expected numbers of classes, '0' to '9', got '{name}'"):
        measure_class_judgements([judged(name)], wanting(2), 10)


class Flagging(Defense):
    """Flags class 1, and keeps an array."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        arrays = {"masks": torch.full((3, 1, 4, 4), 0.5, dtype=torch.bfloat16)}
        judgement = Judgement(
            "class", "it is 1", scores={"1": 3.0}, threshold=2.0, suspicious=["1"], arrays=arrays
        )
        return DefenseResult("judged", task.model, (judgement,))


@pytest.mark.parametrize("target", [None, 0, 1])
def test_a_run_has_the_shares_after_the_defense_and_keeps_the_arrays(tmp_path, monkeypatch, target) -> None:
    monkeypatch.setitem(defenses.registry._local, "flagging", Flagging)
    spec = tiny_spec(poison={"rate": 0.25, "target": target or 0}, train={"epochs": 1, "batch_size": 32})
    spec = clean_twin(spec) if target is None else spec
    parent = Runner(spec, tmp_path).finish(spec)
    run = run_defense(parent, PartSpec("flagging", {"clean_fraction": 0.5}))
    expected = {"class_fpr": (100 / 3, 3)}
    if target is not None:
        hit = 100.0 * (target == 1)
        expected = {"class_tpr": (hit, 1), "class_fpr": (50.0 - hit / 2, 2)}
    found = {name: metric for name, metric in run.record.metrics.items() if name.startswith("class")}
    assert values(found) == pytest.approx(expected)
    assert "class_fpr" not in run.record.stages[0]["metrics"]
    assert run.record.stages[-1]["metrics"]["class_fpr"] == run.record.metrics["class_fpr"]
    kept = run.folder.load_scores()
    assert list(kept) == ["0/masks"] and kept["0/masks"].dtype == np.float32
    assert (kept["0/masks"] == 0.5).all() and kept["0/masks"].shape == (3, 1, 4, 4)
