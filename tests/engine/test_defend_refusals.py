"""Defenses and parents that are refused, or fail."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from defense_tasks import PRUNING, TUNING, defended_spec
from tiny import Tiny, tiny_spec
from tiny_runs import Counting
from torch import Tensor, nn

from backdoorbench_moe import defenses, models
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import Runner, run_attack, run_defense
from backdoorbench_moe.errors import BbmoeError, ConfigError, PluginError, RecordError


@pytest.fixture
def offer(monkeypatch):
    """Offer a defense under a name for the test."""
    return lambda name, part: monkeypatch.setitem(defenses.registry._local, name, part)


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


class NotANumber(Bad):
    """Gives back a model whose weights are NaN: argmax would call every image class 0, the target."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Spoil the weights."""
        with torch.no_grad():
            task.model.head.weight.fill_(float("nan"))
        return DefenseResult("spoilt", task.model)


class Ends(Bad):
    """Ends Python."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Exit."""
        sys.exit(5)


class Twice(Bad):
    """Reports a stage that the engine has already."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Report."""
        task.report("before", task.model)
        return DefenseResult("after", task.model)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Grown, "same architecture"),
        (Empty, "DefenseResult, got None"),
        (Twice, "a new name"),
        (NotANumber, "NaN, found it in head.weight"),
        (Ends, "SystemExit: 5"),
    ],
)
def test_a_defense_that_breaks_the_interface_is_recorded_as_failed(tmp_path, offer, part, message) -> None:
    offer("bad", part)
    spec = defended_spec({"name": "bad"})
    with pytest.raises(PluginError, match=message):
        Runner(spec, tmp_path).finish(spec)
    record = load_run(tmp_path / spec.name).record
    assert record.status == "failed" and message in record.error and not record.stages


BAD = {
    "pruning all": (
        {"name": "fine-pruning", "ratio": 1.0},
        r"defense 'fine-pruning': ratio: expected a number in \[0, 1\)",
    ),
    "no number": (
        {"name": "fine-pruning", "ratio": "x"},
        r"defense 'fine-pruning': ratio: expected a number, got 'x'",
    ),
    "no such option": (
        {"name": "fine-pruning", "ratoi": 1},
        r"defense 'fine-pruning': option: unknown 'ratoi'; did you mean",
    ),
    "no channel": (
        {"name": "fine-pruning", "ratio": 0.1},
        r"defense 'fine-pruning': ratio: 0\.1 prunes none of the 4 channels",
    ),
    "too few images": (
        {"name": "fine-tuning", "clean_fraction": 0.02},
        r"defense 'fine-tuning': clean_fraction: 0\.02 of 96 .* is 1;",
    ),
    "unknown": ({"name": "fine-prunning"}, "defense: unknown 'fine-prunning'; did you mean 'fine-pruning'"),
}


@pytest.mark.parametrize(("part", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said_before_anything_is_trained_or_written(tmp_path, part, message) -> None:
    spec = replace(tiny_spec(), defenses=(PartSpec(part.pop("name"), part),))
    counting = Counting()
    for act in (lambda s: s.finish(spec), lambda s: s.maker(spec), lambda s: s.attack(spec)):
        with pytest.raises(ConfigError, match=message):
            act(Runner(tiny_spec(), tmp_path / "runs", counting))
    assert counting.epochs == 0 and not (tmp_path / "runs").exists()


def test_the_defense_that_is_wrong_is_named(tmp_path) -> None:
    spec = defended_spec(
        TUNING, {**PRUNING, "scope": "experts"}, model={"name": "wide_resnet", "widen_factor": 1}
    )
    with pytest.raises(
        ConfigError, match=r"defense 'fine-pruning': scope: expected one of \['trunk', 'all'\] for WideRes"
    ):
        Runner(spec, tmp_path).finish(spec)


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
        ConfigError, match=r"defense 'fine-pruning': scope: the model Nameless does not name its components"
    ):
        Runner(tiny_spec(), tmp_path / "none").finish(defended_spec(**values))
    assert not (tmp_path / "none").exists()
    spec = defended_spec(TUNING, **values)
    assert Runner(spec, tmp_path).finish(spec).record.status == "finished"


def test_a_parent_that_is_not_the_one_or_was_made_from_other_data_is_refused(tmp_path, monkeypatch) -> None:
    session = Runner(tiny_spec(), tmp_path)
    other = session.finish(tiny_spec(seed=1))
    with pytest.raises(RecordError, match="is not the finished run that is to be defended"):
        session.finish(defended_spec(), inputs={"parent": other})
    monkeypatch.setattr(Tiny, "offset", 1)
    with pytest.raises(RecordError, match="was made from other data"):
        run_defense(other, PartSpec("fine-tuning", {"clean_fraction": 0.5}))
    monkeypatch.setattr(Tiny, "names", ("red", "green", "blue", "none"))
    with pytest.raises(RecordError, match="model for the 4 classes of the data, got one for other"):
        run_defense(other, PartSpec("fine-tuning", {"clean_fraction": 0.5}))
    assert [path.name for path in tmp_path.iterdir()] == [other.folder.path.name]


def test_a_parent_without_its_model_is_refused_before_anything_is_written(tmp_path) -> None:
    [victim] = run_attack(tiny_spec(), output=tmp_path, twin=False)
    (victim.folder.path / "model.safetensors").unlink()
    with pytest.raises(BbmoeError, match="not found"):
        run_defense(victim, PartSpec("fine-tuning", {"clean_fraction": 0.5}))
    assert [path.name for path in tmp_path.iterdir()] == [victim.folder.path.name]
