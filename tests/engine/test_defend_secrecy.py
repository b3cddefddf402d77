"""What a defense sees, and what it does not: trigger, poisoned indices, test images and their metrics."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import FunctionType, ModuleType

import pytest
import torch
from defense_tasks import PRUNING, TUNING, defended_spec, outcome
from tiny import Tiny
from tiny_mixture import mixture_spec
from torch import Tensor

from backdoorbench_moe import defenses
from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.attacks.data_poisoning import DataPoisoning
from backdoorbench_moe.config import PartSpec, PoisonSpec, RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.defenses.base import NEEDS, Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine import runner
from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.engine.graph import needs
from backdoorbench_moe.engine.makers import defend as makers_defend
from backdoorbench_moe.engine.makers import inputs
from backdoorbench_moe.engine.makers.defend import DefenseMaker
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import Runner
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.moe.merging import MergedModel
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.triggers.base import Trigger


@pytest.fixture
def offer(monkeypatch):
    """Offer a defense under a name for the test."""
    return lambda name, part: monkeypatch.setitem(defenses.registry._local, name, part)


JUDGEMENTS = (
    Judgement(
        "class",
        "its score is high",
        scores={"0": 0.1, "1": 0.9, "2": 0.2},
        threshold=0.5,
        suspicious=["1"],
        details={"rounds": 3},
    ),
    Judgement("sample", "odd", scores=torch.arange(96.0), suspicious=torch.tensor([0, 2])),
)


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
        return DefenseResult("last", task.model, JUDGEMENTS)


class MixtureSpy(Spy):
    """The same for a mixture, whose heads lie elsewhere."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Spy."""
        self.tasks.append(task)
        return DefenseResult("last", task.model)


SECRETS = (
    *(Stamper, Trigger, Applicator, PoisonPlan, PoisonSpec, RunSpec, Record, RunFolder, Run),
    *(Runner, Workplace, ImageSetup, DefenseMaker, ImageSet, Attack, Triggered),
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


# A mixture has tasks, and a policy gives marked images a safe answer. The mark is then no secret.
OF_MIXTURES = ("marked", "tasks")


@pytest.mark.parametrize("need", [need for need in NEEDS if need not in OF_MIXTURES])
def test_nothing_a_defense_is_given_leads_to_the_attacker(tmp_path, offer, monkeypatch, need) -> None:
    """Structural: a walk over all the task refers to, closures and bound methods included; grant by grant."""
    Spy.tasks.clear()
    offer("spy", Spy)
    monkeypatch.setattr(Spy, "needs", frozenset({need}))
    spec = defended_spec({"name": "spy"}, trigger={"name": "square", "size": 5})
    session = Runner(spec, tmp_path)
    session.finish(spec)
    [task] = Spy.tasks
    assert set(task.granted) == {need}
    for other in {*NEEDS} - {need}:
        with pytest.raises(PluginError, match=f"uses '{other}', which is not declared"):
            getattr(task, other.replace("-", "_"))
    found = reachable(task)
    assert not [item for item in found if isinstance(item, SECRETS)]
    assert not [text for text in found if isinstance(text, str) and "square" in text]
    poisoned = set(load_run(tmp_path / needs(spec)["parent"].name).folder.load_poison().tolist())
    test = session.workplace.images.test.images
    for tensor in (item for item in found if isinstance(item, Tensor)):
        assert tensor.untyped_storage().data_ptr() != test.untyped_storage().data_ptr()
        assert tensor.dtype != torch.int64 or tensor.ndim != 1 or set(tensor.tolist()) != poisoned
    # The walk does find what is there: from the job that makes the task it gets to all of it.
    maker = DefenseMaker(spec, session.workplace)
    kinds = {type(item) for item in reachable(maker) if isinstance(item, SECRETS)}
    assert {Stamper, PoisonPlan, RunSpec, Workplace, ImageSetup, ImageSet, DataPoisoning} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize("need", OF_MIXTURES)
def test_nothing_that_a_defense_of_a_mixture_is_given_leads_to_the_attacker(
    tmp_path, offer, monkeypatch, need
) -> None:
    Spy.tasks.clear()
    offer("spy", MixtureSpy)
    monkeypatch.setattr(MixtureSpy, "needs", frozenset({need}))
    spec = replace(mixture_spec(), defenses=(PartSpec("spy"),))
    session = Runner(spec, tmp_path)
    session.finish(spec)
    [task] = Spy.tasks
    assert set(task.granted) == {need} and isinstance(task.fresh(), MergedModel)
    found = reachable(task)
    assert not [item for item in found if isinstance(item, SECRETS)]
    assert not [text for text in found if isinstance(text, str) and ("square" in text or "moevil" in text)]
    test = session.workplace.images.test.images
    for tensor in (item for item in found if isinstance(item, Tensor)):
        assert tensor.untyped_storage().data_ptr() != test.untyped_storage().data_ptr()


def test_stages_are_measured_by_the_engine_after_the_defense_has_returned(
    tmp_path, offer, monkeypatch
) -> None:
    from backdoorbench_moe.engine.setups.images import ImageSetup

    Spy.answers.clear()
    offer("spy", Spy)
    calls: list[int] = []
    measure = ImageSetup.measure
    monkeypatch.setattr(
        ImageSetup, "measure", lambda *a, **k: (calls.append(len(Spy.answers)), measure(*a, **k))[1]
    )
    spec = defended_spec({"name": "spy", "stages": ["one", "two"]})
    run = Runner(spec, tmp_path).finish(spec)
    assert calls == [0, 0, 2, 2, 2], (
        "the victim, and before the defense; then, both reports made, one, two and last"
    )
    assert Spy.answers == [None, None]
    stages = {stage["name"]: stage["metrics"] for stage in run.record.stages}
    assert list(stages) == ["before", "one", "two", "last"]
    assert stages["before"] == stages["one"] == stages["two"], "a shift of all logits changes nothing"
    assert stages["last"]["asr"]["value"] == 0.0, "the target's logit is out of reach"
    one, two = run.record.judgements
    assert (one["about"], one["scores"], one["threshold"]) == ("class", {"0": 0.1, "1": 0.9, "2": 0.2}, 0.5)
    assert (one["suspicious"], one["details"]) == (["1"], {"rounds": 3}) and one[
        "reason"
    ] == "its score is high"
    assert (two["about"], two["scores"], two["suspicious"]) == ("sample", None, 2)
    arrays = run.folder.load_scores()
    assert arrays["1/scores"].tolist() == list(range(96)) and arrays["1/suspicious"].tolist() == [0, 2]
    tensors, parent = run.folder.load_tensors()[0], load_run(tmp_path / needs(spec)["parent"].name)
    shift = tensors["head.bias"] - parent.folder.load_tensors()[0]["head.bias"]
    torch.testing.assert_close(shift, torch.tensor([-998.0, 2.0, 2.0]), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("part", [PRUNING, TUNING], ids=["fine-pruning", "fine-tuning"])
def test_the_outcome_does_not_depend_on_the_attack(tmp_path, monkeypatch, part) -> None:
    """The same weights under another trigger, target and poisoned set: the defended weights are the same."""
    # The model that is put in the place of the other attack's is not the one of its record.
    monkeypatch.setattr(makers_defend, "check_same", lambda *_, **__: None)
    for module in (inputs, runner):
        monkeypatch.setattr(module, "check_model", lambda *_, **__: None)
    one, two = defended_spec(part), defended_spec(part, trigger="blend", poison={"rate": 0.5, "target": 2})
    runs = []
    for spec in (one, two):
        session = Runner(spec, tmp_path)
        parent = session.finish(needs(spec)["parent"])
        parent.folder.save_model(load_run(tmp_path / needs(one)["parent"].name).folder.load_tensors()[0], {})
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


@pytest.mark.slow
def test_clean_and_notebook_data_and_their_share(tmp_path, offer) -> None:
    offer("holder", Holder)
    train = Tiny().load().train
    spec = defended_spec({"name": "holder"})
    session = Runner(spec, tmp_path)
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
    assert len(few) == 24 and torch.equal(session.workplace.images.train.images, train.images), (
        "the data were written to"
    )
    places = [int((train.images == image).flatten(1).all(1).nonzero()) for image in few]
    assert places == sorted(set(places)) and few_labels.tolist() == train.labels[places].tolist()
    noted, _ = Holder.held["notebook 0.25"]
    assert torch.equal(noted, stamped[places])


class Reader(Defense):
    """Keeps the training set and its losses."""

    needs = frozenset({"training-set", "features", "losses"})
    held: list[object] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Keep, and deface."""
        split = task.training_set
        self.held += [split.images.clone(), split.labels.clone()]
        self.held += [task.losses(task.model, split), task.features(task.model, split.images)]
        split.images.zero_()
        return DefenseResult("kept", task.model)


def test_the_training_set_is_the_victims_own_and_a_copy(tmp_path, offer) -> None:
    Reader.held.clear()
    offer("reader", Reader)
    spec = defended_spec({"name": "reader"})
    runner = Runner(spec, tmp_path)
    run = runner.finish(spec)
    images, labels, losses, features = Reader.held
    train, indices = Tiny().load().train, run.folder.load_poison()
    differs = (images != train.images).flatten(1).any(1).nonzero().flatten().tolist()
    assert differs == indices.tolist() and (images[indices, :, :4, :4] == 0).all()
    assert (labels[indices] == 0).all() and torch.equal(runner.workplace.images.train.images, train.images)
    model = run.model()
    with torch.no_grad():
        logits = model(images.float().div(255))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        again = model.classify(features)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    assert run.record.data["clean_images"] == 0
