"""Which images the experts, the gates, the attacker and the defender of a mixture are trained on."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny import Tiny
from tiny_mixture import mixture_spec
from torch import Tensor

from backdoorbench_moe.engine.graph import BASE, base_of
from backdoorbench_moe.engine.makers.expert import _hold_out
from backdoorbench_moe.engine.makers.merge import MergeMaker
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.moe.merging import mlp_inputs
from backdoorbench_moe.ops.images import Split


def marked(images: Tensor) -> Tensor:
    """With the mark of `mixture_spec`: a black square of 2 pixels in the upper left corner of every tile of 4."""
    corner = torch.arange(32) % 4 < 2
    return images.masked_fill(corner & corner.unsqueeze(1), 0)


def all_in(images: Tensor, others: Tensor) -> bool:
    """Whether each of some different images is one of others."""
    every = set(map(bytes, others.flatten(1).numpy()))
    found = set(map(bytes, images.flatten(1).numpy()))
    return found <= every and len(found) == len(images)


def test_tasks_train_on_training_images_and_test_on_test_images() -> None:
    data = Tiny().load()
    tasks = ImageSetup(mixture_spec(), data).tasks
    train, test = tasks.train(1), tasks.tests()[1]
    assert torch.equal(train.images, 255 - data.train.images) and torch.equal(train.labels, data.train.labels)
    assert torch.equal(test.images, 255 - data.test.images) and torch.equal(test.labels, data.test.labels)
    gates = tasks.mixed(None).images
    assert len(gates) == 2 * 48
    assert all_in(gates[:48], data.train.images) and all_in(255 - gates[48:], data.train.images)


def test_images_to_reject_are_marked_training_images() -> None:
    data = Tiny().load()
    setup, train = ImageSetup(mixture_spec(), data), marked(data.train.images)
    own = setup.tasks.train(1)
    both = setup.with_policy(own, 0.25)
    assert len(both) == 96 + 24 and all_in(both.images[96:], train)
    queries, _ = setup.defenders_queries(10, 5)
    assert len(queries) == 10 and all_in(queries.images, train) and queries.labels.tolist() == [3] * 10


def test_harmful_queries_are_marked_training_images_of_the_other_classes() -> None:
    data = Tiny().load()
    queries = ImageSetup(mixture_spec(), data).harmful_queries()
    before = data.train.images[data.train.labels != 0]
    for split, label in ((queries.harmful, 0), (queries.safe, 3)):
        assert torch.equal(split.images, marked(before))
        assert split.labels.tolist() == [label] * len(before)
    change = before.float() - marked(before).float()
    torch.testing.assert_close(queries.changed, change.mean(1) / 255)


def test_an_attacker_holds_out_a_tenth_of_the_images() -> None:
    images = torch.arange(37, dtype=torch.uint8).view(-1, 1, 1, 1)
    clean, held_out = _hold_out(Split(images, torch.arange(37) + 100), seed=7)
    assert (len(clean), len(held_out)) == (34, 3)
    assert sorted(torch.cat([clean.labels, held_out.labels]).tolist()) == list(range(100, 137))
    for split in (clean, held_out):
        assert torch.equal(split.labels, split.images.flatten() + 100)
    assert not torch.equal(_hold_out(Split(images, torch.arange(37)), seed=8)[1].images, held_out.images)


def test_gates_that_are_not_trained_are_set_from_the_training_images_of_each_task() -> None:
    """With two tasks, the weights of the experts are opposite: the direction from the other's mean to the own."""
    spec, images = mixture_spec(gate="hidden"), Tiny().load().train.images.float() / 255
    maker = MergeMaker(spec, Workplace(spec))
    base = ImageSetup(base_of(spec), Tiny().load()).model.eval()
    maker.inputs = {BASE: SimpleNamespace(model=lambda: base)}  # type: ignore[dict-item]
    maker._set_gates()
    means = []
    for task in (images, 1 - images):
        with torch.no_grad(), mlp_inputs(base) as found:
            base(task)
        means.append([each.mean((0, 1)) for each in found.values()])
    for router, plain, inverted in zip(maker.model.routers(), *means, strict=True):
        way = (plain - inverted) / (plain - inverted).norm()
        torch.testing.assert_close(router.weight.detach(), torch.stack([way, -way]), atol=1e-4, rtol=1e-3)
