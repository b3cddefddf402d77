"""Defending mixtures: every defense runs, is measured on all tasks, and gives the same numbers again."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from defense_tasks import outcome
from mixture_runs import mixture_spec
from poisoned_mixtures import poisoned_mixture
from tiny import tiny_spec

from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import run_attack, run_defense
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.testing.making import copies

FAST: dict[str, dict[str, Any]] = {
    "align": {"epochs": 1},
    "defensive-expert": {"preference_epochs": 1, "epochs": 1, "gate_epochs": 1},
    "rasa": {"rounds": 1, "epochs": 1},
    "expert-drop": {"count": 2},
    "expert-reset": {"epochs": 1},
    "router-reset": {"epochs": 1},
    "reroute": {},
    "fine-pruning": {"epochs": 1},
    "fine-tuning": {"epochs": 1},
    "fst": {"reset": "head+router", "epochs": 1},
    "ft-sam": {"epochs": 1},
    "nad": {"gate_weight": 1000.0, "epochs": 1},
    "i-bau": {"applicator": "patch", "rounds": 1, "inner_steps": 2, "fixed_point_steps": 2},
    "strip": {"blends": 4, "fpr": 0.1},
    "routing-strip": {"blends": 4, "fpr": 0.1},
    "clp": {"u": 1.0},
    "anp": {"steps": 2},
    "rnp": {"epochs": 1},
    "neural-cleanse": {"epochs": 1, "unlearn_epochs": 1},
    "tile-tuning": {"epochs": 1},
    "tile-distillation": {"epochs": 1},
    "scale-up": {"reserve": 8, "fpr": 0.1},
    "ibd-psc": {"models": 2, "reserve": 8, "fpr": 0.1},
    "routing-load": {"reserve": 8, "fpr": 0.1},
}
# They need stored statistics of norms, or the one training set of a model.
REFUSED = {"bnp", "spectral", "activation-clustering", "scan", "abl"}
GATES: dict[str, dict[str, Any]] = {
    "top-k": {"gate": "top-k"},
    # Draws an expert for every token in evaluation, too.
    "sample-top1": {"gate": {"name": "sample-top1", "init_std": 0.1}},
}
MADE: dict[str, Run] = {}


@pytest.fixture
def mixture(request, tmp_path_factory) -> Run:
    """A finished mixture with the gate of that name; it is made once."""
    if request.param not in MADE:
        spec = mixture_spec(**GATES[request.param])
        [MADE[request.param]] = run_attack(spec, output=tmp_path_factory.mktemp("runs"), twin=False)
    return MADE[request.param]


def defend(run: Run, name: str, output: Path, **options: Any) -> Run:
    held = {} if name == "clp" else {"clean_fraction": 0.5}
    part = PartSpec(name, {**held, **FAST[name], **options})
    return run_defense(run, part, output=output)


def test_every_built_in_defense_is_tried_here() -> None:
    points = entry_points(group="backdoorbench_moe.defenses")
    assert {point.name for point in points if point.dist.name == "backdoorbench-moe"} == (
        FAST.keys() | REFUSED
    )


@pytest.mark.slow
@pytest.mark.parametrize("mixture", GATES, indirect=True)
@pytest.mark.parametrize("name", FAST)
def test_the_same_command_gives_the_same_numbers(tmp_path, mixture, name) -> None:
    """And before the defense, exactly those of the mixture's record, also where experts are drawn at random."""
    one, other = (defend(mixture, name, tmp_path / each) for each in ("one", "other"))
    assert outcome(one) == outcome(other)
    before, *_, last = one.record.stages
    assert one.record.status == "finished" and before["name"] == "before"
    for metric in ("ba", "asr", "unsafe", "task/0.ba", "task/1.ba"):
        assert before["metrics"][metric] == mixture.record.metrics[metric], metric
    # 60 test images of each of two tasks. Marked are those that do not have the target class: 40.
    assert last["metrics"]["ba"]["n"] == 120 and last["metrics"]["unsafe"]["n"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("mixture", ["top-k"], indirect=True)
def test_a_defended_mixture_can_be_defended_again(tmp_path, mixture) -> None:
    once = defend(mixture, "expert-drop", tmp_path)
    twice = defend(once, "align", tmp_path)
    assert twice.record.stages[0]["metrics"]["unsafe"] == once.record.metrics["unsafe"]
    assert [row["name"] for row in twice.record.stages] == ["before", "aligned"]


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        *[
            (
                name,
                mixture_spec(policy=0.0),
                rf"defense '{name}': needs marked images with a safe answer, "
                "which only a run with a policy has; this run has policy=0",
            )
            for name in ("align", "defensive-expert", "rasa")
        ],
        ("align", tiny_spec(), r"defense 'align': model: expected a mixture of merged experts, got PMoE"),
        (
            "defensive-expert",
            mixture_spec(),
            r"defense 'defensive-expert': expert: expected a number in 0\.\.1, got 2",
        ),
    ],
    ids=["align", "defensive-expert", "rasa", "not a mixture", "no such expert"],
)
def test_what_cannot_be_defended_is_refused_before_anything_is_written(tmp_path, name, spec, message) -> None:
    options = {"clean_fraction": 0.5} | ({"expert": 2} if "got 2" in message else {})
    with pytest.raises(ConfigError, match=message):
        run_attack(with_defense(spec, PartSpec(name, options)), output=tmp_path)
    assert not list(tmp_path.iterdir())


def with_defense(spec: RunSpec, part: PartSpec) -> RunSpec:
    return replace(spec, defenses=(part,))


def test_a_reset_starts_the_schedule_of_the_temperature_again() -> None:
    """Three batches of 16 of 48 images: the step is 3 after one epoch, wherever it was before."""
    model, task, reported = poisoned_mixture("sample-top1", batch_size=16)
    for layer in model.layers():
        layer.router.step.fill_(100)
    create_defense("router-reset", epochs=1)(task)
    names = [f"{layer.name}.router.step" for layer in model.layers()]
    [(stage, reset)] = reported
    assert stage == "reset" and [reset[name].item() for name in names] == [0, 0]
    assert [copies(model)[name].item() for name in names] == [3, 3]


def test_a_reset_leaves_masked_experts_masked() -> None:
    model, task, _ = poisoned_mixture()
    model.mask_expert(model.experts()[0])
    create_defense("router-reset", epochs=1)(task)
    assert [layer.router.masked.tolist() for layer in model.layers()] == [[True, False], [False, False]]


def test_gates_are_trained_at_their_own_rate_unless_all_is_trained() -> None:
    _, task, _ = poisoned_mixture()
    rates = []
    object.__setattr__(task, "tune", lambda *_, lr, **__: rates.append(lr))
    for options in ({}, {"scope": "all"}, {"lr": 0.2}):
        create_defense("router-reset", **options)(task)
    assert rates == [task.gate_train.lr, None, 0.2] and task.gate_train.lr != task.train.lr


def test_an_expert_that_is_dropped_has_no_effect() -> None:
    """With one expert of a layer muted, its weights do not matter any more."""
    model, task, _ = poisoned_mixture()
    [judged] = create_defense("expert-drop", count=2)(task).judgements
    answers = task.logits(model, task.marked.images)
    dropped = [each for each in model.experts() if each.name in judged.suspicious]
    assert len({each.layer for each in dropped}) == 2, "every layer keeps one"
    state = model.state_dict()
    with torch.no_grad():
        for expert in dropped:
            for name, (start, stop) in expert.own.items():
                if not name.endswith(".heard"):
                    state[name][start:stop] += 1
    assert torch.equal(task.logits(model, task.marked.images), answers)
