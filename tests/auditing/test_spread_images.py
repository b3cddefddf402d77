"""The order of the images of an audit: its checks look at the first ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mixture_runs import mixture_spec
from planted_models import row_images
from subjects import Rows
from tiny import Tiny

from backdoorbench_moe.auditing import opening
from backdoorbench_moe.auditing.opening import spread
from backdoorbench_moe.engine.setups.tasks import Tasks
from backdoorbench_moe.errors import ConfigError


@pytest.mark.parametrize(
    "classes", [range(6), (0, 7, 10**15)], ids=["all classes", "labels that no model has"]
)
def test_every_beginning_of_spread_images_has_all_classes(classes) -> None:
    count = len(classes)
    labels = torch.tensor([label for label in classes for _ in range(5)])
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    found, own = spread(images, labels)
    for begin in range(0, len(labels), count):
        assert set(own[begin : begin + count].tolist()) == set(classes)
    place = found[:, 0, 0, 0]
    assert place.sort().values.tolist() == list(range(len(labels)))
    assert torch.equal(labels[place], own)
    assert torch.equal(spread(images, labels)[0], found)


def test_without_labels_images_are_spread_in_a_random_order() -> None:
    images = torch.arange(60).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    found, own = spread(images, None)
    place = found[:, 0, 0, 0].tolist()
    assert own is None and sorted(place) == list(range(60))
    # Of images that were given class by class, ten of each of six classes, the first ones are of several.
    assert len({number // 10 for number in place[:12]}) >= 3
    assert torch.equal(spread(images, None)[0], found)


def test_an_audit_looks_at_images_of_all_classes_first() -> None:
    split = row_images(60)
    order = split.labels.argsort(stable=True)
    subject = opening.open_module_subject(Rows(), images=split.images[order], labels=split.labels[order])
    assert subject.images is not None
    rows = {str(image.tolist()): int(label) for image, label in zip(split.images, split.labels, strict=True)}
    assert {rows[str(image.tolist())] for image in subject.images[:6]} == set(range(6))
    with pytest.raises(ConfigError, match=r"labels: expected classes in 0\.\.5, .* got 0\.\.10{15}$"):
        opening.open_module_subject(Rows(), images=split.images, labels=[0] * 59 + [10**15])


def test_the_first_images_of_a_mixture_are_of_all_tasks(monkeypatch) -> None:
    spec, images = mixture_spec(), Tiny().load()
    monkeypatch.setattr(opening, "load_run_images", lambda *_: images)
    run = SimpleNamespace(spec=spec, located_spec=lambda: spec)
    split, tasks, names = opening._run_images(run, None)
    tests = Tasks(spec, images).tests()
    assert len(names) == len(tests) == len(tasks) == 2
    known = [{image.numpy().tobytes() for image in test.images} for test in tests]
    owners = [[image.numpy().tobytes() in of for of in known] for image in split.images]
    assert all(map(any, owners))
    first = owners[:8]
    assert [sum(of) for of in zip(*first, strict=True)] != [8, 0] and all(
        any(of) for of in zip(*first, strict=True)
    )
    classes = split.labels.unique()
    assert set(split.labels[: len(classes)].tolist()) == set(classes.tolist())
