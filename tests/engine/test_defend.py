"""A defended run: made from its parent, measured by the engine, kept apart from the attacker."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from types import FunctionType, ModuleType

import pytest
import torch
from defense_tasks import CPU, changed
from safetensors import safe_open
from tiny import TINY_MODEL, Tiny, tiny_spec
from torch import Tensor, nn

from backdoorbench_moe import defenses, models
from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.config import PartSpec, PoisonSpec, RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.engine.defend import DefenseJob
from backdoorbench_moe.engine.evaluate import count_hits, predict
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.parts import Stamper
from backdoorbench_moe.engine.poison import PoisonPlan, triggered_test
from backdoorbench_moe.engine.runner import Run, Session, load_run, run_attack, run_defense
from backdoorbench_moe.errors import BbmoeError, ConfigError, PluginError, RecordError
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.triggers.base import Trigger

PRUNING = {"name": "fine-pruning", "ratio": 0.25, "clean_fraction": 0.5, "epochs": 1}
TUNING = {"name": "fine-tuning", "clean_fraction": 0.5, "epochs": 1}


def defended_spec(*parts: dict[str, object], **values: object) -> RunSpec:
    """A tiny spec with these defenses."""
    return tiny_spec(defenses=list(parts or [PRUNING]), **values)


def outcome(run: Run) -> tuple[object, ...]:
    """What must be equal, bit for bit, between two ways to the same run."""
    tensors, _ = run.folder.load_tensors()
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        for rows in (run.record.history, run.record.stages)
    ]
    return run.record.metrics, timeless, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


class Counting(Observer):
    """Counts epochs; interrupts after a given one, as Ctrl-C would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.epochs, self.stop_after = 0, stop_after

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Count."""
        self.epochs += 1
        if self.epochs == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def offer(monkeypatch):
    """Offer a defense under a name for the test."""
    return lambda name, part: monkeypatch.setitem(defenses.registry._local, name, part)


def test_the_parent_is_finished_first_and_the_folder_holds_all(tmp_path) -> None:
    spec = defended_spec()
    run = Session(spec, tmp_path).attack(spec)
    parent = load_run(tmp_path / spec.parent().name)
    record = json.loads((run.folder.path / "record.json").read_text())
    assert record["status"] == "finished" and record["parent"] == parent.folder.path.name
    assert record["spec"]["defenses"] == [PRUNING] and "-fine-pruning-" in run.folder.path.name
    assert [stage["name"] for stage in record["stages"]] == ["before", "pruned", "tuned"]
    assert record["data"]["clean_images"] == 48 and record["parts"]["defense"]["ratio"] == 0.25
    assert len(record["history"]) == 1 and record["seeds"]["defense"]
    for stage in record["stages"]:
        for metric, count in (("ba", 60), ("asr", 40), ("ra", 40)):
            entry = stage["metrics"][metric]
            assert entry["n"] == count and 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 100
    before, last = record["stages"][0]["metrics"], record["stages"][-1]["metrics"]
    assert {name: before[name] for name in ("ba", "asr")} == {
        name: parent.record.metrics[name] for name in ("ba", "asr")
    }
    clean = load_run(tmp_path / record["clean_twin"])
    assert clean.spec == tiny_spec().clean_twin()
    cad = {"value": clean.value("ba") - last["ba"]["value"], "n": 60}
    assert record["metrics"] == {**last, "cad": cad} and "cad" not in last
    names = sorted(path.name for path in run.folder.path.iterdir())
    assert names == [".lock", "model.safetensors", "poison.npz", "record.json"]
    assert (run.folder.load_poison() == parent.folder.load_poison()).all()
    with safe_open(run.folder.path / "model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert header["backdoored"] == "true" and header["defended_by"] == "fine-pruning"
    assert header["parent"] == parent.folder.path.name and header["digest"] == spec.digest


def test_the_record_can_be_measured_again_from_the_folder_alone(tmp_path) -> None:
    spec = defended_spec(train={"epochs": 4, "batch_size": 8})
    run = Session(spec, tmp_path).finish(spec)
    images, model = Tiny().load(), load_run(run.folder.path).model()
    assert run.value("ba") == 100 * count_hits(model, images.test, precision="fp32") / 60
    triggered, labels = triggered_test(images, spec.poison, run.stamper())
    predicted = predict(model, triggered.images, precision="fp32")
    assert run.value("asr") == 100 * (predicted == triggered.labels).double().mean().item()
    assert run.value("ra") == pytest.approx(100 * (predicted == labels).double().mean().item())
    assert run.value("asr") + run.value("ra") <= 100
    zero = (run.folder.load_tensors()[0]["moe.conv.weight"] == 0).flatten(1).all(1)
    assert zero.reshape(4, 4).sum(1).tolist() == [1, 1, 1, 1]


def test_the_same_spec_gives_the_same_numbers_and_a_finished_run_is_only_read(tmp_path) -> None:
    spec = defended_spec()
    one = Session(spec, tmp_path / "one").finish(spec)
    torch.manual_seed(99)
    two = Session(spec, tmp_path / "two").finish(spec)
    assert outcome(one) == outcome(two)
    again = Counting()
    assert outcome(Session(spec, tmp_path / "one", again).finish(spec)) == outcome(one)
    assert again.epochs == 0


def test_a_defended_run_can_be_defended_again(tmp_path) -> None:
    [victim] = run_attack(tiny_spec(), output=tmp_path)
    once = run_defense(victim, PartSpec("fine-pruning", {k: v for k, v in PRUNING.items() if k != "name"}))
    twice = run_defense(once, PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1}))
    assert twice.record.parent == once.folder.path.name
    assert twice.spec.defenses == (
        *once.spec.defenses,
        PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1}),
    )
    assert twice.record.stages[0]["metrics"] == once.record.stages[-1]["metrics"]
    assert twice.record.clean_twin == victim.record.clean_twin and "cad" in twice.record.metrics
    whole = Session(twice.spec, tmp_path / "whole").finish(defended_spec(PRUNING, TUNING))
    assert len(list((tmp_path / "whole").iterdir())) == 3
    assert outcome(whole)[1:] == outcome(twice)[1:]


def test_another_output_leaves_the_runs_own_folder_as_it_was(tmp_path) -> None:
    [victim] = run_attack(tiny_spec(), output=tmp_path / "runs", twin=False)
    moved = victim.folder.path.rename(tmp_path / "runs" / "elsewhere")
    run = run_defense(
        load_run(moved), PartSpec("fine-tuning", {"clean_fraction": 0.5}), output=tmp_path / "out"
    )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["elsewhere"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [run.folder.path.name]
    assert run.record.parent == "elsewhere" and "cad" not in run.record.metrics


def test_a_clean_run_may_be_defended(tmp_path) -> None:
    spec = replace(tiny_spec().clean_twin(), defenses=(PartSpec("fine-tuning", {"clean_fraction": 0.5}),))
    run = Session(spec, tmp_path).attack(spec)
    assert set(run.record.metrics) == {"ba"} and "-clean-fine-tuning-" in run.folder.path.name


def test_interrupted_it_starts_over_from_its_parent(tmp_path) -> None:
    spec = defended_spec({**PRUNING, "epochs": 3})
    whole = Session(spec, tmp_path / "whole").finish(spec)
    session = Session(spec, tmp_path / "cut")
    session.finish(spec.parent())
    session.observer = Counting(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        session.finish(spec)
    folder = RunFolder(tmp_path / "cut" / spec.name)
    record = folder.read()
    assert record.status == "interrupted" and not record.metrics and not record.stages
    assert not (folder.path / "model.safetensors").exists()
    with pytest.raises(RecordError, match="expected a finished run, its status is 'interrupted'"):
        run_defense(load_run(folder.path), PartSpec("fine-tuning"))
    session.observer = Counting()
    assert outcome(session.finish(spec)) == outcome(whole)
    assert session.observer.epochs == 3


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


class Bad(Defense):
    """Takes half the images; what it does breaks the interface in a way that a subclass says."""

    def __init__(self, *, clean_fraction: float = 0.5) -> None:
        super().__init__(clean_fraction=clean_fraction)


class Grown(Bad):
    """Gives back a model of another shape."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Grow."""
        task.model.head = nn.Linear(3, 3)
        return DefenseResult("grown", task.model)


class Empty(Bad):
    """Gives back nothing."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Nothing."""
        return None  # type: ignore[return-value]


class Twice(Bad):
    """Reports a stage that the engine has already."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Report."""
        task.report("before", task.model)
        return DefenseResult("after", task.model)


@pytest.mark.parametrize(
    ("part", "message"),
    [(Grown, "same architecture"), (Empty, "DefenseResult, got None"), (Twice, "a new name")],
)
def test_a_defense_that_breaks_the_interface_is_recorded_as_failed(tmp_path, offer, part, message) -> None:
    offer("bad", part)
    spec = defended_spec({"name": "bad"})
    with pytest.raises(PluginError, match=message):
        Session(spec, tmp_path).finish(spec)
    record = load_run(tmp_path / spec.name).record
    assert record.status == "failed" and message in record.error and not record.stages


BAD = {
    "pruning all": (
        {"name": "fine-pruning", "ratio": 1.0},
        r"defenses\[0\]\.ratio: expected a number in \[0, 1\)",
    ),
    "no number": (
        {"name": "fine-pruning", "ratio": "x"},
        r"defenses\[0\]\.ratio: expected a number, got 'x'",
    ),
    "no such option": (
        {"name": "fine-pruning", "ratoi": 1},
        r"defenses\[0\]\.option: unknown 'ratoi'; did you mean",
    ),
    "no channel": ({"name": "fine-pruning", "ratio": 0.1}, r"defenses\[0\]\.ratio: 0\.1 of the 4 channels"),
    "too few images": (
        {"name": "fine-tuning", "clean_fraction": 0.02},
        r"\[0\]\.clean_fraction: 0\.02 of 96 .* is 1;",
    ),
    "unknown": ({"name": "fine-prunning"}, "defense: unknown 'fine-prunning'; did you mean 'fine-pruning'"),
}


@pytest.mark.parametrize(("part", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said_before_anything_is_trained_or_written(tmp_path, part, message) -> None:
    spec = replace(tiny_spec(), defenses=(PartSpec(part.pop("name"), part),))
    counting = Counting()
    for act in (lambda s: s.finish(spec), lambda s: s.check(spec), lambda s: s.attack(spec)):
        with pytest.raises(ConfigError, match=message):
            act(Session(tiny_spec(), tmp_path / "runs", counting))
    assert counting.epochs == 0 and not (tmp_path / "runs").exists()


def test_the_defense_that_is_wrong_is_named_by_its_place(tmp_path) -> None:
    spec = defended_spec(
        TUNING, {**PRUNING, "scope": "experts"}, model={"name": "wide_resnet", "widen_factor": 1}
    )
    with pytest.raises(
        ConfigError, match=r"defenses\[1\]\.scope: expected one of \['trunk', 'all'\] for WideRes"
    ):
        Session(spec, tmp_path).finish(spec)


class Nameless(nn.Module):
    """A third party's model that names none of its parts."""

    def __init__(self, *, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        self.head = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(images.flatten(1))


def test_a_model_that_names_no_parts_can_be_tuned_but_not_pruned(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(models.registry._local, "nameless", Nameless)
    values = {"model": "nameless", "train": {"lr": 0.01}}
    with pytest.raises(
        ConfigError, match=r"defenses\[0\]\.scope: the model Nameless does not name its parts"
    ):
        Session(tiny_spec(), tmp_path / "none").finish(defended_spec(**values))
    assert not (tmp_path / "none").exists()
    spec = defended_spec(TUNING, **values)
    assert Session(spec, tmp_path).finish(spec).record.status == "finished"


def test_a_parent_that_is_not_the_one_or_was_made_from_other_data_is_refused(tmp_path, monkeypatch) -> None:
    import tiny

    session = Session(tiny_spec(), tmp_path)
    other = session.finish(tiny_spec(seed=1))
    with pytest.raises(RecordError, match="is not the finished run that is to be defended"):
        session.finish(defended_spec(), parent=other)
    split = tiny.Tiny._split
    monkeypatch.setattr(tiny.Tiny, "_split", lambda self, count, seed: split(self, count, seed + 1))
    with pytest.raises(RecordError, match="was made from other data"):
        run_defense(other, PartSpec("fine-tuning", {"clean_fraction": 0.5}))
    four = ("red", "green", "blue", "none")
    monkeypatch.setattr(
        tiny.Tiny, "read", lambda self: ImageSet("tiny", self._split(96, 1), self._split(60, 2), four)
    )
    with pytest.raises(RecordError, match="its model tells 3 classes apart, which are not the 4 of the data"):
        run_defense(other, PartSpec("fine-tuning", {"clean_fraction": 0.5}))
    assert [path.name for path in tmp_path.iterdir()] == [other.folder.path.name]


def test_a_parent_without_its_model_is_refused_before_anything_is_written(tmp_path) -> None:
    [victim] = run_attack(tiny_spec(), output=tmp_path, twin=False)
    (victim.folder.path / "model.safetensors").unlink()
    with pytest.raises(BbmoeError, match="not found"):
        run_defense(victim, PartSpec("fine-tuning", {"clean_fraction": 0.5}))
    assert [path.name for path in tmp_path.iterdir()] == [victim.folder.path.name]


@pytest.mark.slow
def test_fine_tuning_makes_a_model_forget_and_pruning_alone_does_not(tmp_path) -> None:
    """End to end, on data where it is easy: the paper's finding in small."""
    train = {"epochs": 25, "batch_size": 8, "optimizer": "adamw", "lr": 0.005, "schedule": "one-cycle"}
    white = {"name": "square", "size": 12, "colour": [1.0, 1.0, 1.0]}
    part = {
        "name": "fine-pruning",
        "ratio": 0.25,
        "clean_fraction": 1.0,
        "finetune_data": "notebook",
        "epochs": 10,
    }
    spec = defended_spec(part, trigger=white, model={**TINY_MODEL, "bn_momentum": 0.1}, train=train)
    run = Session(spec, tmp_path).finish(spec)
    before, pruned, tuned = (stage["metrics"] for stage in run.record.stages)
    assert before["asr"]["value"] >= 90 and pruned["asr"]["value"] >= 90
    assert tuned["asr"]["value"] <= 10 and tuned["ra"]["value"] >= 80 and tuned["ba"]["value"] >= 90


def test_the_model_on_disk_is_that_of_the_last_stage(tmp_path) -> None:
    spec = defended_spec()
    run = Session(spec, tmp_path).finish(spec)
    parent = load_run(tmp_path / spec.parent().name)
    assert changed(parent.model().to(CPU).state_dict(), run.model().state_dict())
    assert parent.record == load_run(parent.folder.path).record
