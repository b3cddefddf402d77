"""Training by an attacker who is in charge of it: what a batch becomes, resuming, and the kept trigger."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny, count_hits, tiny_spec
from tiny_runs import Counting, outcome
from torch import nn
from torch.nn import functional as F

from backdoorbench_moe import attacks
from backdoorbench_moe.attacks.training_control import TrainingControl
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.engine.build import cut
from backdoorbench_moe.engine.makers.control import ControlledTraining, _others
from backdoorbench_moe.engine.makers.train import TrainMaker
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack, run_defense
from backdoorbench_moe.engine.setups.defenses import check_applicable
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.ops.images import as_input

TRIGGER = {"name": "input-aware", "channels": 2, "mask_epochs": 1}
POISON = {"rate": 0.25, "noise": 0.25}


def spec_of(**values):
    base = {"attack": "training-control", "trigger": TRIGGER, "poison": POISON}
    return tiny_spec(**(base | values))


def make_control(**values) -> ControlledTraining:
    spec = spec_of(**values)
    workplace = Workplace(spec)
    return ControlledTraining(spec, ImageSetup(spec, workplace.images), workplace)


def split_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    split = Tiny().load().train
    return as_input(split.images[:count]), split.labels[:count]


class Seen(nn.Module):
    """A model that keeps its input."""

    def forward(self, images):
        self.images = images
        return torch.zeros(len(images), 3, requires_grad=True)


def test_the_first_images_are_stamped_and_relabelled_and_the_next_bear_other_stamps() -> None:
    control, model = make_control(), Seen()
    images, labels = split_of(8)
    logits, loss = control.objective(model, images, labels)
    trigger = control.trigger
    expected = torch.cat(
        [trigger.stamp_from(images[:2], images[:2]), trigger.stamp_from(images[2:4], images[4:6]), images[4:]]
    )
    torch.testing.assert_close(model.images, expected)
    extra = trigger.joint_loss(images[:2], images[4:6])
    assert len(logits) == 8
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels).item() + extra.item())


def test_where_half_of_a_batch_is_poisoned_no_image_bears_its_own_stamp_as_noise() -> None:
    """The first two of four are poisoned, and the other two bear the stamps of the next image and of the first."""
    control, model = make_control(poison={"rate": 0.5, "noise": 0.5}), Seen()
    images, labels = split_of(4)
    _, loss = control.objective(model, images, labels)
    stamp = control.trigger.stamp_from
    expected = torch.cat([stamp(images[:2], images[:2]), stamp(images[2:], images[[3, 0]])])
    torch.testing.assert_close(model.images, expected)
    assert loss.item() > control.trigger.joint_loss(images[:2], images[2:]).item() > 0


@pytest.mark.parametrize("size", range(2, 10))
def test_another_image_of_a_batch_is_never_the_image_itself(size) -> None:
    batch = torch.arange(size).view(-1, 1, 1, 1)
    for first in range(size):
        for count in range(1, size - first + 1):
            found = _others(batch, first, count).flatten().tolist()
            assert len(set(found)) == count and all(other != own for own, other in enumerate(found, first))


@pytest.mark.parametrize("applicator", ["image", "patch"])
def test_a_plain_trigger_is_stamped_anew_on_every_batch(applicator) -> None:
    """WaNet's own threat model: its noise is redrawn, while the stamp itself stays the same."""
    control = make_control(trigger={"name": "warp", "strength": 2.0}, applicator=applicator)
    images, labels = split_of(8)
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        control.objective(model := Seen(), images, labels)
        seen.append(model.images)
    expected = control.stamper(images[:2])
    for found in seen:
        torch.testing.assert_close(found[:2], expected)
        assert not torch.isclose(found[2:4], images[2:4]).all((1, 2, 3)).any()
        assert torch.equal(found[4:], images[4:])
    assert not torch.isclose(seen[0][2:4], seen[1][2:4]).all((1, 2, 3)).any()


def test_poisoned_images_count_with_the_attackers_class() -> None:
    """A model that always answers the target has the smallest loss on the poisoned images alone."""
    control = make_control(trigger="square", poison={"rate": 0.5, "noise": 0.0, "target": 1})
    images = split_of(4)[0]

    class Fixed(nn.Module):
        def forward(self, images):
            return 5.0 * F.one_hot(torch.tensor([1, 1, 2, 0]), 3)

    _, loss = control.objective(Fixed(), images, torch.tensor([0, 2, 2, 0]))
    assert loss.item() == pytest.approx(F.cross_entropy(5.0 * torch.eye(3), torch.arange(3)).item())


def test_labels_are_smoothed_as_in_the_recipe() -> None:
    control = make_control(
        trigger="square", poison={"rate": 0.5, "noise": 0.0}, train={"label_smoothing": 0.3, "epochs": 1}
    )
    images, labels = split_of(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    logits, loss = control.objective(model, images, labels)
    answers = torch.tensor([0, 0, *labels[2:].tolist()])
    assert loss.item() == pytest.approx(F.cross_entropy(logits, answers, label_smoothing=0.3).item())


def test_a_stamp_that_is_drawn_for_each_image_is_redrawn_in_every_batch() -> None:
    control = make_control(trigger="patches", poison={"rate": 1.0, "noise": 0.0})
    images, labels = split_of(16)
    seen = []
    for _ in range(2):
        control.objective(model := Seen(), images, labels)
        seen.append((model.images != images).flatten(1))
    assert not torch.equal(*seen)


class Reversed(TrainingControl):
    """Learns the wanted class from triggered images twice, and remembers the batch."""

    def loss(self, model, batch):
        self.batch = batch
        logits, loss = batch.usual_loss(model)
        triggered = F.cross_entropy(logits[: batch.poison], batch.labels[: batch.poison])
        return logits, loss + triggered


def test_an_attack_may_have_a_loss_of_its_own() -> None:
    control = make_control(trigger={"name": "warp", "strength": 2.0}, poison={"rate": 0.5, "noise": 0.25})
    control.attack = attack = Reversed(poison=control.attack.poison)
    images, labels = split_of(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    logits, loss = control.objective(model, images, labels)
    batch = attack.batch
    assert (batch.poison, batch.noise) == (2, 1)
    assert torch.equal(batch.clean, images) and torch.equal(batch.truth, labels)
    torch.testing.assert_close(batch.images[:2], control.stamper(images[:2]))
    assert torch.equal(batch.images[3], images[3]) and not torch.equal(batch.images[2], images[2])
    assert batch.labels.tolist() == [0, 0, *labels[2:].tolist()]
    torch.testing.assert_close(logits, model(batch.images))
    both = F.cross_entropy(logits, batch.labels) + F.cross_entropy(logits[:2], batch.labels[:2])
    assert loss.item() == pytest.approx(both.item())


class Shapeless(TrainingControl):
    """Returns one loss for each image."""

    def loss(self, model, batch):
        logits, _ = batch.usual_loss(model)
        return logits, logits.square().sum(1)


def test_an_own_loss_that_is_no_number_is_named(tmp_path) -> None:
    attacks.registry.register("shapeless")(Shapeless)
    try:
        spec = tiny_spec(attack="shapeless", trigger="square", poison={"rate": 0.25})
        with pytest.raises(PluginError, match=r"expected logits \(\d+, classes\) and a scalar loss"):
            run_attack(spec, output=tmp_path, twin=False)
    finally:
        attacks.registry.unregister("shapeless")


def test_tiles_are_cut_as_the_applicator_does() -> None:
    control = make_control(applicator={"name": "patch", "patch_size": 8})
    images = split_of(2)[0]
    canvases = cut(control.stamper.applicator, images)
    assert canvases.shape == (32, 3, 8, 8)
    assert torch.equal(canvases[0], images[0, :, :8, :8])


def test_the_trigger_is_kept_and_stamps_the_test_images(tmp_path) -> None:
    """Also after the masks were trained, which then rest; a defended run keeps the trigger, too."""
    [run] = run_attack(spec_of(), output=tmp_path, twin=False)
    again = load_run(run.folder.path)
    images = Tiny().load()
    triggered = triggered_test(images, again.attack(), again.stamper())
    hits = count_hits(again.model(), Split(triggered.images, triggered.wanted))
    assert run.value("asr") == 100 * hits / len(triggered)
    blank, learned = (each.trigger.networks.state_dict() for each in (again.blank_stamper(), again.stamper()))
    for kind in ("mask", "pattern"):
        assert any(not torch.equal(blank[k], learned[k]) for k in blank if k.startswith(kind)), kind
    assert len(run.folder.load_poison()) == 0
    assert again.record.parts["trigger"]["state_sha256"] == again.folder.trigger_sha256
    defended = run_defense(run, PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1}))
    assert defended.folder.trigger_sha256 == run.folder.trigger_sha256
    assert defended.record.stages[0]["metrics"]["asr"] == run.record.metrics["asr"]


def test_the_mask_rests_while_the_model_is_trained(tmp_path) -> None:
    control = make_control()
    control.pretrain()
    companion = control.companion()
    assert companion is not None
    mask = control.trigger.networks["mask"]
    assert not mask.training and not any(p.requires_grad for p in mask.parameters())
    before = {k: v.clone() for k, v in control.trigger.networks.state_dict().items()}
    images, labels = split_of(16)
    for network in companion.trained:
        network.train()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    control.objective(model, images, labels)[1].backward()
    companion.optimizer.step()
    after = control.trigger.networks.state_dict()
    changed = {k.partition(".")[0] for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed == {"pattern"}


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 2, 3], ids=["after the mask", "after epoch 1", "after epoch 2"])
def test_an_interrupted_run_gives_the_same_model_and_trigger(tmp_path, stop_after) -> None:
    spec = spec_of(train={"epochs": 3, "batch_size": 32, "lr": 0.1, "augment": "crop-flip"})
    [whole] = run_attack(spec, output=tmp_path / "whole", twin=False)
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=tmp_path / "cut", twin=False, observer=Counting(stop_after=stop_after))
    [resumed] = run_attack(spec, output=tmp_path / "cut", twin=False)
    assert outcome(resumed) == outcome(whole)
    assert resumed.folder.trigger_sha256 == whole.folder.trigger_sha256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attack": "data-poisoning"}, r"attack: expected training-control, as the trigger 'input-aware'"),
        ({"trigger": "blend"}, r"poison\.noise: the trigger 'blend' has no noise form"),
        ({"poison": {"rate": 0.01}}, r"poison\.rate: expected at least 1/32, one image of a batch"),
        ({"poison": {"rate": 0.25, "cover": 0.1}}, r"poison\.cover: expected 0\.0"),
        ({"poison": {"rate": 0.25, "labels": "clean"}}, r"poison\.labels: expected 'dirty'"),
        ({"poison": {"rate": 0.25, "source": [1]}}, r"poison\.source: expected"),
        ({"poison": {"rate": 0.0}}, r"poison\.rate: expected a number in \(0, 1\]"),
        ({"probe": 4}, r"probe: expected 0 for a trigger that is trained"),
        (
            {"trigger": {"name": "narcissus", "surrogate": "same"}},
            r"trigger: expected one that is not optimised",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, values, message) -> None:
    spec = spec_of(**values)
    with pytest.raises(ConfigError, match=message):
        TrainMaker(spec, Workplace(spec))


def test_defenses_that_need_the_training_set_are_refused_where_there_is_no_such_set() -> None:
    spec = spec_of()
    setup = ImageSetup(spec, Workplace(spec).images)
    marked = tiny_spec(attack=None, policy=0.25, poison={"rate": 0})
    with pytest.raises(ConfigError, match=r"^needs the original training set; .* has marked images"):
        check_applicable(create_defense("abl", ratio=0.1), ImageSetup(marked, Workplace(marked).images))
    half = {"clean_fraction": 0.5}
    for name, options in (
        ("spectral", {}),
        ("activation-clustering", {}),
        ("scan", half),
        ("abl", {"ratio": 0.1}),
    ):
        with pytest.raises(ConfigError, match=r"^needs the training set .* poisoned every batch"):
            check_applicable(create_defense(name, **options), setup)
    check_applicable(create_defense("fine-tuning", **half), setup)
