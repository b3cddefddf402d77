"""Judgements about training images: measured against the plan, which the defense does not know."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch
from defense_tasks import defended_spec
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_spec

from backdoorbench_moe import attacks, defenses
from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.cli.tables.runs import judgement_lines
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.measuring.samples import count_samples, measure_samples
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import Runner, run_defense
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.testing import making
from backdoorbench_moe.testing.making import changed

AC = {"rule": "silhouette", "silhouette": 0.01, "retrain": False}
CLUSTERING = PartSpec("activation-clustering", AC)


def plan_of(*indices: int, cover: tuple[int, ...] = (), noise: tuple[int, ...] = ()) -> PoisonPlan:
    groups = [torch.tensor(group, dtype=torch.int64) for group in (indices, cover, noise)]
    return PoisonPlan(groups[0], torch.zeros_like(groups[0]), *groups[1:])


def measure(scores, suspicious, plan: PoisonPlan | None, images: int = 10):
    given = None if scores is None else torch.tensor(scores, dtype=torch.float32)
    judgement = Judgement(
        "sample", "odd", scores=given, suspicious=torch.tensor(suspicious, dtype=torch.int64)
    )
    entry: dict[str, object] = {}
    metrics = measure_samples([judgement], [entry], plan, images)
    return {name: (found["value"], found["n"]) for name, found in metrics.items()}, entry["counts"]


def test_a_table_by_hand() -> None:
    """Poisoned are 1, 2, 3 and 5. Of them 2 and 3 are found, and so are 0, a cover image, and 9, one of noise.

    Of the 24 pairs of a poisoned and another image, the poisoned one has the higher score in 6 + 4 + 3.5 + 0.
    """
    scores = [5.0, 9.0, 5.5, 5.0, 4.0, 1.0, 3.0, 3.5, 4.5, 6.0]
    metrics, counts = measure(scores, [0, 2, 3, 9], plan_of(1, 2, 3, 5, cover=(0, 4), noise=(8, 9)))
    assert counts == {"tp": 2, "fn": 2, "fp": 2, "tn": 4, "cover": 1, "noise": 1}
    assert metrics == {
        "sample_tpr": (50.0, 4),
        "sample_fpr": (pytest.approx(100 / 3), 6),
        "sample_auroc": (pytest.approx(100 * (6 + 5 + 4.5) / 24), 10),
    }


def test_perfect_scores_have_an_area_of_1_and_inverted_ones_of_0() -> None:
    plan = plan_of(2, 7)
    perfect = [float(place in (2, 7)) for place in range(10)]
    metrics, counts = measure(perfect, [2, 7], plan)
    assert {name: value for name, (value, _) in metrics.items()} == {
        "sample_tpr": 100, "sample_fpr": 0, "sample_auroc": 100
    }  # fmt: skip
    assert counts == {"tp": 2, "fn": 0, "fp": 0, "tn": 8}
    assert measure([-score for score in perfect], [], plan)[0]["sample_auroc"][0] == 0


def test_nothing_flagged_misses_every_poison_and_raises_no_alarm() -> None:
    metrics, counts = measure(None, [], plan_of(2, 7))
    assert counts == {"tp": 0, "fn": 2, "fp": 0, "tn": 8}
    assert metrics == {"sample_tpr": (0, 2), "sample_fpr": (0, 8)}
    assert measure(None, [3, 3], None) == ({"sample_fpr": (10, 10)}, {"tp": 0, "fn": 0, "fp": 1, "tn": 9})
    every = plan_of(*range(10))
    assert measure([1.0] * 10, [0], every)[0] == {"sample_tpr": (10, 10)}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_found_and_missed_are_all_poisons(rows: list[tuple[bool, bool]]) -> None:
    flagged, poison = map(torch.tensor, zip(*rows, strict=True))
    counts = count_samples(flagged, poison)
    assert counts["tp"] + counts["fn"] == poison.sum() and counts["tp"] + counts["fp"] == flagged.sum()
    assert sum(counts.values()) == len(rows)


@pytest.mark.parametrize(
    ("scores", "suspicious", "message"),
    [
        (
            [1.0] * 9,
            [],
            "scores: expected a finite score for each of 10 training images, got 9, 9 of them finite",
        ),
        ([1.0] * 9 + [float("nan")], [], "got 10, 9 of them finite"),
        (None, [10], r"suspicious: expected indices in 0\.\.9, got \[10\]"),
        (None, [-1], r"suspicious: expected indices in 0\.\.9"),
    ],
)
def test_what_is_not_of_the_training_set_is_refused(scores, suspicious, message) -> None:
    with pytest.raises(PluginError, match=f"judgement about sample: .*{message}"):
        measure(scores, suspicious, plan_of(1))


@pytest.mark.slow
def test_an_attacked_run_and_its_clean_twin(tmp_path) -> None:
    spec = defended_spec({"name": "spectral", "epsilon": 0.2, "epochs": 1})
    run = Runner(spec, tmp_path).attack(spec)
    record = json.loads((run.folder.path / "record.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["before", "retrained"]
    plan, scores = run.folder.load_poison(), run.folder.load_scores()
    flagged = set(scores["0/suspicious"].tolist())
    found = len(flagged & set(plan.tolist()))
    counts = record["judgements"][0]["counts"]
    assert counts == {
        "tp": found,
        "fn": 24 - found,
        "fp": len(flagged) - found,
        "tn": 72 - len(flagged) + found,
    }
    metrics = record["metrics"]
    assert (
        metrics["sample_tpr"]["value"] == pytest.approx(100 * found / 24) and metrics["sample_tpr"]["n"] == 24
    )
    assert record["stages"][-1]["metrics"]["sample_fpr"] == metrics["sample_fpr"]
    assert metrics["sample_fpr"]["n"] == 72 and metrics["sample_auroc"]["n"] == 96
    assert {"ba", "asr", "ra", "cad"} <= metrics.keys() and not {"auroc", "tpr", "fpr"} & metrics.keys()
    [line] = judgement_lines(record["judgements"][0])
    assert f"{len(flagged)} suspicious (tp {found}, fn {24 - found}, fp" in line
    # One epoch on what is left.
    assert len(record["history"]) == 1
    took, speed = record["timing"]["train_seconds"], record["timing"]["images_per_second"]
    assert took * speed == pytest.approx(96 - len(flagged))
    twin = replace(clean_twin(spec), defenses=(CLUSTERING,))
    clean = Runner(twin, tmp_path).attack(twin).record
    # Activation clustering judges classes, too.
    assert set(clean.metrics) == {"ba", "cad", "sample_fpr", "class_fpr"}
    assert clean.judgements[0]["counts"] == {
        "tp": 0, "fn": 0, "fp": clean.judgements[0]["suspicious"], "tn": 96 - clean.judgements[0]["suspicious"]
    }  # fmt: skip
    assert clean.judgements[0]["suspicious"] > 0


class Nowhere(Attack):
    """Claims to have poisoned some images, and changes none."""

    uses_trigger = False

    def __init__(self, *, poison, first: int = 0) -> None:
        super().__init__(poison=poison)
        self.first = first

    def plan(self, labels, num_classes, seed):
        """Ten images with the labels that they have."""
        indices = torch.arange(self.first, self.first + 10)
        return PoisonPlan(indices, labels[indices])


MADE: list[Run] = []


@pytest.fixture
def alike(tmp_path_factory, monkeypatch) -> list[Run]:
    """Two runs with the same training set and model, and with other plans; they are made once."""
    monkeypatch.setitem(attacks.registry._local, "nowhere", Nowhere)
    for first in (0, 40) if not MADE else ():
        spec = tiny_spec(attack={"name": "nowhere", "first": first}, trigger=None, applicator=None)
        MADE.append(Runner(spec, tmp_path_factory.mktemp("runs")).finish(spec))
    return MADE


def defended_alike(alike: list[Run], part: PartSpec, output) -> list[Run]:
    """Defend both; all that is recorded and kept is equal but for the numbers that are measured against the plan."""
    runs = [run_defense(parent, part, output=output) for parent in alike]
    judged, stages, arrays = [], [], []
    for run in runs:
        judged.append([{**entry, "counts": None} for entry in run.record.judgements])
        metrics = [stage["metrics"].items() for stage in run.record.stages]
        stages.append([{k: v for k, v in found if not k.startswith("sample_")} for found in metrics])
        scores = run.folder.load_scores() if (run.folder.path / "scores.npz").exists() else {}
        arrays.append({name: values.tobytes() for name, values in scores.items()})
    assert judged[0] == judged[1] and stages[0] == stages[1] and arrays[0] == arrays[1]
    assert not changed(*(run.folder.load_tensors()[0] for run in runs))
    return runs


def test_other_poison_indices_give_equal_results_of_the_defense(alike, tmp_path) -> None:
    """The training set is the same, only the plan is not: it enters the measurement alone."""
    runs = defended_alike(alike, CLUSTERING, tmp_path)
    suspicious = runs[0].folder.load_scores()["0/suspicious"]
    assert len(suspicious)
    counts = [run.record.judgements[0]["counts"] for run in runs]
    assert counts[0] != counts[1]
    for first, found in zip((0, 40), counts, strict=True):
        inside = (suspicious >= first) & (suspicious < first + 10)
        assert found["tp"] == inside.sum() and found["tp"] + found["fn"] == 10


# Those of mixtures need tasks or marked images; no image of a mixture's data is poisoned.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        point.name
        for point in entry_points(group="backdoorbench_moe.defenses")
        if point.dist.name == "backdoorbench-moe" and not {"marked", "tasks"} & point.load().needs
    ],
)
def test_no_defense_depends_on_the_poison_indices(alike, tmp_path, name) -> None:
    options = making.tiny_options("defense", name)
    if "clean" in defenses.registry.lookup(name).needs:
        options["clean_fraction"] = 0.5
    defended_alike(alike, PartSpec(name, options), tmp_path)
