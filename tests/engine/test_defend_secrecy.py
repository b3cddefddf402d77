"""What a defense sees, and what it does not: trigger, poisoned indices, test images and their metrics."""

from __future__ import annotations

import gc
from types import FunctionType, ModuleType

import pytest
import torch
from defense_tasks import PRUNING, TUNING, defended_spec, outcome
from tiny import Tiny
from torch import Tensor

from backdoorbench_moe import defenses
from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.config import PoisonSpec, RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.engine.defend import DefenseJob
from backdoorbench_moe.engine.parts import Stamper
from backdoorbench_moe.engine.poison import PoisonPlan
from backdoorbench_moe.engine.runner import Run, Session, load_run
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.triggers.base import Trigger


@pytest.fixture
def offer(monkeypatch):
    """Offer a defense under a name for the test."""
    return lambda name, part: monkeypatch.setitem(defenses.registry._local, name, part)


class Spy(Defense):
    """Keeps its task, changes one weight a stage, and looks at what reporting gives back."""

    tasks: list[DefenseTask] = []  # noqa: RUF012
    answers: list[object] = []  # noqa: RUF012

    def __init__(self, *, clean_fraction: float = 0.5, stages: tuple[str, ...] = ("one",)) -> None:
        super().__init__(clean_fraction=clean_fraction)
        self.stages = stages

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Spy."""
        self.tasks.append(task)
        for stage in self.stages:
            with torch.no_grad():
                task.model.head.bias.add_(1.0)
            self.answers.append(task.report(stage, task.model))
        with torch.no_grad():
            task.model.head.bias[0] -= 1000.0
        return DefenseResult("last", task.model, scores={"class": [0.1, 0.9, 0.2]}, verdict={"model": True})


SECRETS = (
    *(Stamper, Trigger, Applicator, PoisonPlan, PoisonSpec, RunSpec, Record, RunFolder, Run),
    *(Session, DefenseJob, ImageSet),
)


def reachable(*roots: object) -> list[object]:
    """Everything that code can get to from an object, but for modules, classes and functions' globals."""
    seen: dict[int, object] = {}
    todo = list(roots)
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (ModuleType, type)):
            continue
        seen[id(item)] = item
        if isinstance(item, FunctionType):
            todo += [item.__closure__, item.__defaults__, item.__kwdefaults__]
        else:
            todo += gc.get_referents(item)
    return list(seen.values())


def test_nothing_a_defense_is_given_leads_to_the_attacker(tmp_path, offer) -> None:
    """Structural: a walk over all the task refers to, closures and bound methods included."""
    Spy.tasks.clear()
    offer("spy", Spy)
    spec = defended_spec({"name": "spy"}, trigger={"name": "square", "size": 5})
    session = Session(spec, tmp_path)
    session.finish(spec)
    [task] = Spy.tasks
    found = reachable(task)
    assert not [item for item in found if isinstance(item, SECRETS)]
    assert not [text for text in found if isinstance(text, str) and "square" in text]
    poisoned = set(load_run(tmp_path / spec.parent().name).folder.load_poison().tolist())
    test = session.images.test.images
    for tensor in (item for item in found if isinstance(item, Tensor)):
        assert tensor.untyped_storage().data_ptr() != test.untyped_storage().data_ptr()
        assert tensor.dtype != torch.int64 or tensor.ndim != 1 or set(tensor.tolist()) != poisoned
    # The walk does find what is there: from the job that makes the task it gets to all of it.
    job = DefenseJob(spec, session, load_run(tmp_path / spec.parent().name))
    kinds = {type(item) for item in reachable(job) if isinstance(item, SECRETS)}
    assert {Stamper, PoisonPlan, RunSpec, Session, ImageSet, Run} <= kinds


def test_stages_are_measured_by_the_engine_after_the_defense_has_returned(
    tmp_path, offer, monkeypatch
) -> None:
    from backdoorbench_moe.engine import job

    Spy.answers.clear()
    offer("spy", Spy)
    calls: list[int] = []
    measure = job.measure
    monkeypatch.setattr(job, "measure", lambda *a, **k: (calls.append(len(Spy.answers)), measure(*a, **k))[1])
    spec = defended_spec({"name": "spy", "stages": ["one", "two"]})
    run = Session(spec, tmp_path).finish(spec)
    assert calls == [0, 2, 2, 2, 2], "the victim's once; then, both reports made, before, one, two and last"
    assert Spy.answers == [None, None]
    stages = {stage["name"]: stage["metrics"] for stage in run.record.stages}
    assert list(stages) == ["before", "one", "two", "last"]
    assert stages["before"] == stages["one"] == stages["two"], "a shift of all logits changes nothing"
    assert stages["last"]["asr"]["value"] == 0.0, "the target's logit is out of reach"
    assert run.record.scores == {"class": [0.1, 0.9, 0.2]} and run.record.verdict == {"model": True}
    tensors, parent = run.folder.load_tensors()[0], load_run(tmp_path / spec.parent().name)
    shift = tensors["head.bias"] - parent.folder.load_tensors()[0]["head.bias"]
    torch.testing.assert_close(shift, torch.tensor([-998.0, 2.0, 2.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("part", [PRUNING, TUNING], ids=["fine-pruning", "fine-tuning"])
def test_the_outcome_does_not_depend_on_the_attack(tmp_path, part) -> None:
    """The same weights under another trigger, target and poisoned set: the defended weights are the same."""
    one, two = defended_spec(part), defended_spec(part, trigger="blend", poison={"rate": 0.5, "target": 2})
    runs = []
    for spec in (one, two):
        session = Session(spec, tmp_path)
        parent = session.finish(spec.parent())
        parent.folder.save_model(load_run(tmp_path / one.parent().name).folder.load_tensors()[0], {})
        runs.append(session.finish(spec))
    assert outcome(runs[0])[2] == outcome(runs[1])[2]
    assert runs[0].record.poison != runs[1].record.poison


class Holder(Defense):
    """Keeps the images it was given."""

    held: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, *, clean_fraction: float = 1.0, finetune_data: str = "clean") -> None:
        super().__init__(clean_fraction=clean_fraction, finetune_data=finetune_data)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Keep them, and deface them."""
        self.held[f"{self.finetune_data} {self.clean_fraction}"] = (
            task.clean.images.clone(),
            task.clean.labels,
        )
        task.clean.images.zero_()
        return DefenseResult("kept", task.model)


def test_clean_and_notebook_data_and_their_share(tmp_path, offer) -> None:
    offer("holder", Holder)
    train = Tiny().load().train
    spec = defended_spec({"name": "holder"})
    session = Session(spec, tmp_path)
    for data, fraction in (("clean", 1.0), ("notebook", 1.0), ("clean", 0.25), ("notebook", 0.25)):
        part = {"name": "holder", "finetune_data": data, "clean_fraction": fraction}
        run = session.finish(defended_spec(part))
    images, labels = Holder.held["clean 1.0"]
    assert torch.equal(images, train.images) and torch.equal(labels, train.labels)
    stamped, labels = Holder.held["notebook 1.0"]
    assert torch.equal(labels, train.labels), "the poisoned ones too are called what they are"
    differs = (stamped != train.images).flatten(1).any(1).nonzero().flatten().tolist()
    assert differs == run.folder.load_poison().tolist() and len(differs) == 24
    assert (stamped[differs, :, :4, :4] == 0).all()
    few, few_labels = Holder.held["clean 0.25"]
    assert len(few) == 24 and torch.equal(session.images.train.images, train.images), (
        "the data were written to"
    )
    places = [int((train.images == image).flatten(1).all(1).nonzero()) for image in few]
    assert places == sorted(set(places)) and few_labels.tolist() == train.labels[places].tolist()
    noted, _ = Holder.held["notebook 0.25"]
    assert torch.equal(noted, stamped[places])
