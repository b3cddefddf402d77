"""Conformance tests of splitters."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from backdoorbench_moe.errors import ConfigError, ShapeError, UnknownNameError
from backdoorbench_moe.ops import images as images_module
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.splitters.base import Splitter
from backdoorbench_moe.testing.making import make

# Number of classes, and side of the images in pixels.
DATA = {"10 classes of 32 px": (10, 32), "7 classes of 48 px": (7, 48)}
SEED = 7


class Tasks:
    """A splitter with images to split: two of each class in a row, then shuffled, all different."""

    def __init__(self, splitter: Splitter, num_classes: int, side: int) -> None:
        self.splitter, self.num_classes = splitter, num_classes
        draws = torch.Generator().manual_seed(side)
        labels = torch.arange(4 * num_classes) % num_classes
        images = torch.randint(0, 256, (len(labels), 3, side, side), generator=draws, dtype=torch.uint8)
        # Transforms change uniform images least, or in an extreme way.
        images[0], images[1], images[2] = 0, 255, 128
        self.split = Split(images, labels[torch.randperm(len(labels), generator=draws)])
        self.names = splitter.names(num_classes, SEED)
        self.tasks = range(len(self.names))

    def take(
        self, task: int, split: Split | None = None, *, seed: int = SEED, training: bool = False
    ) -> Split:
        """The images of a task."""
        given = {"num_classes": self.num_classes, "seed": seed, "training": training}
        return self.splitter(self.split if split is None else split, task, **given)

    def members(self, task: int, *, training: bool = False) -> torch.Tensor:
        """The indices of the images of a task."""
        given = {"num_classes": self.num_classes, "seed": SEED, "training": training}
        return self.splitter.find_members(self.split.labels, task, **given)


@pytest.fixture(params=DATA.values(), ids=DATA.keys())
def tasks(request: pytest.FixtureRequest, splitter_name: str) -> Tasks:
    return Tasks(make("splitter", splitter_name), *request.param)


def same(one: Split, other: Split) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_there_are_tasks_of_different_names(tasks: Tasks) -> None:
    assert len(tasks.names) >= 2, "one task cannot be split among experts"
    assert all(isinstance(name, str) and name for name in tasks.names)
    assert len(set(tasks.names)) == len(tasks.names)
    assert tasks.splitter.names(tasks.num_classes, SEED) == tasks.names
    tasks.splitter.check(len(tasks.names), tasks.num_classes, SEED)


def test_more_experts_than_tasks_are_refused(tasks: Tasks) -> None:
    with pytest.raises(ConfigError, match=r"expected .*, got "):
        tasks.splitter.check(len(tasks.names) + 1, tasks.num_classes, SEED)


@pytest.mark.parametrize("training", [False, True])
def test_images_and_labels_of_the_members(tasks: Tasks, training: bool) -> None:
    for task in tasks.tasks:
        members, found = tasks.members(task, training=training), tasks.take(task, training=training)
        assert found.images.dtype == torch.uint8
        assert found.images.shape == (len(members), *tasks.split.images.shape[1:])
        assert torch.equal(found.labels, tasks.split.labels[members]), "labels are not those of the members"


@pytest.mark.parametrize("training", [False, True])
def test_the_same_seed_gives_the_same_images(tasks: Tasks, splitter_name: str, training: bool) -> None:
    torch.manual_seed(1)
    first = [tasks.take(task, training=training) for task in tasks.tasks]
    torch.manual_seed(2)
    tasks.splitter = make("splitter", splitter_name)
    for task in reversed(tasks.tasks):
        assert same(tasks.take(task, training=training), first[task]), (
            "draws at random, but not from its seed"
        )


def test_nothing_else_is_written_to(tasks: Tasks) -> None:
    images, labels, state = tasks.split.images.clone(), tasks.split.labels.clone(), torch.get_rng_state()
    for task in tasks.tasks:
        for training in (False, True):
            found = tasks.take(task, training=training)
            found.images.zero_()
            found.labels.zero_()
    assert torch.equal(tasks.split.images, images), "the images were written to"
    assert torch.equal(tasks.split.labels, labels), "the labels were written to"
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"


def test_the_floats_are_not_written_to(tasks: Tasks) -> None:
    floats = tasks.split.images.float() / 255
    before = floats.clone()
    for task in tasks.tasks:
        tasks.splitter.transform(floats, task)
        assert torch.equal(floats, before), "transform wrote to its input"


def test_images_do_not_mix(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tasks.split.images[:7]
    for task in tasks.tasks:
        whole = tasks.splitter.transform_images(images, task)
        alone = torch.cat([tasks.splitter.transform_images(image[None], task) for image in images])
        assert torch.equal(whole, alone), "an image depends on the others of its batch"
        flipped = tasks.splitter.transform_images(images.flip(0), task)
        assert torch.equal(whole, flipped.flip(0)), "an image depends on its place in the batch"
        with monkeypatch.context() as patch:
            patch.setattr(images_module, "CHUNK_VALUES", 2 * images[0].numel())
            assert torch.equal(tasks.splitter.transform_images(images, task), whole), "chunks differ"


def test_tasks_differ(tasks: Tasks) -> None:
    found = [tasks.take(task) for task in tasks.tasks]
    for one, other in combinations(tasks.tasks, 2):
        assert not same(found[one], found[other]), f"tasks {one} and {other} have the same images"


def test_a_task_does_not_depend_on_what_was_asked_before(tasks: Tasks, splitter_name: str) -> None:
    last = tasks.tasks[-1]
    for task in tasks.tasks:
        tasks.take(task, seed=SEED + 1)
    used = tasks.take(last)
    tasks.splitter = make("splitter", splitter_name)
    assert same(tasks.take(last), used), "the splitter has a memory"


def test_global_settings_of_torch_do_not_matter(tasks: Tasks) -> None:
    expected = [tasks.take(task) for task in tasks.tasks]
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [tasks.take(task) for task in tasks.tasks]
    finally:
        torch.set_default_dtype(dtype)
    assert all(map(same, found, expected)), "depends on the default dtype, or on autocast"


def test_memory_layout_does_not_matter(tasks: Tasks) -> None:
    images = tasks.split.images.contiguous(memory_format=torch.channels_last)
    for task in tasks.tasks:
        assert same(tasks.take(task, Split(images, tasks.split.labels)), tasks.take(task))


def test_tasks_that_are_not_there_are_refused(tasks: Tasks) -> None:
    for task in (-1, len(tasks.names)):
        with pytest.raises(
            ConfigError, match=rf"task: expected the number of a task in 0\.\.\d+, got {task}"
        ):
            tasks.take(task)


def test_no_images_are_refused(tasks: Tasks) -> None:
    nothing = Split(tasks.split.images[:0], tasks.split.labels[:0])
    for task in tasks.tasks:
        for training in (False, True):
            with pytest.raises(ConfigError, match=r"expected .*, got "):
                tasks.take(task, nothing, training=training)


@pytest.mark.parametrize("broken", ["float images", "3d images", "float labels"])
def test_invalid_splits_are_refused(tasks: Tasks, broken: str) -> None:
    images, labels = tasks.split.images, tasks.split.labels
    splits = {
        "float images": Split(images.float() / 255, labels),
        "3d images": Split(images[:, 0], labels),
        "float labels": Split(images, labels.float()),
    }
    with pytest.raises(ShapeError, match=rf"{broken.split()[1]}: expected"):
        tasks.take(0, splits[broken])


def test_unknown_options_are_refused_by_name(splitter_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        make("splitter", splitter_name, no_such_option=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_what_the_cpu_gives(tasks: Tasks) -> None:
    """Up to one level of 255, where a value is halfway between two."""
    for task in tasks.tasks:
        found, expected = tasks.take(task, tasks.split.to("cuda")), tasks.take(task)
        assert found.images.is_cuda and torch.equal(found.labels.cpu(), expected.labels)
        assert (found.images.cpu().int() - expected.images.int()).abs().max() <= 1
