"""The script that draws large signs: what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from backdoorbench_moe.bench.suites.reading import load_suite
from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.signs import SIGNS, draw_split
from backdoorbench_moe.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "larger_images.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("larger_images_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_holds_the_drawn_pictures(script, tmp_path) -> None:
    script.write_folder(tmp_path / "signs", 64, train=20, test=10)
    assert [path.name for path in tmp_path.iterdir()] == ["signs"]
    images = create_dataset("folder", root=str(tmp_path / "signs"), image_size=64).load()
    assert images.classes == tuple(sorted(sign.name for sign in SIGNS))
    assert images.train.labels.bincount().tolist() == [2] * 10 and len(images.test) == 10
    drawn = draw_split(1, 10, side=64)
    names = [SIGNS[label].name for label in drawn.labels]
    for picture, label in zip(images.test.images, images.test.labels.tolist(), strict=True):
        assert torch.equal(picture, drawn.images[names.index(images.classes[label])])


def test_a_larger_side_draws_finer_pictures() -> None:
    """Not resized ones: those of twice the side would be nearly their own halves, enlarged."""
    large = draw_split(0, 10, side=64).images.float()
    blocks = large.unfold(2, 2, 2).unfold(3, 2, 2)
    assert blocks.std(dim=(-1, -2)).mean() > 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"side": 4}, "--side"),
        ({"side": 4000}, "--side"),
        ({"train": 15}, "--train-images"),
        ({"test": 0}, "--test-images"),
    ],
)
def test_what_does_not_go_is_refused_and_nothing_written(script, tmp_path, options, name) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        script.write_folder(tmp_path / "signs", **{"side": 32, "train": 10, "test": 10, **options})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(script, tmp_path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        script.write_folder(tmp_path, 32, train=10, test=10)
    assert not list(tmp_path.iterdir())


def test_the_suite_has_the_models_tile_and_wrong_ones() -> None:
    cells = [cell.spec for cell in load_suite("larger-images").cells]
    sizes = {
        (
            spec.dataset.options["image_size"],
            spec.model.options["patch_size"],
            spec.applicator.options.get("patch_size"),
        )
        for spec in cells
    }
    assert sizes == {
        (64, 8, 8),
        (64, 8, 4),
        (64, 8, 16),
        (64, 8, None),
        (224, 16, 16),
        (224, 16, 32),
        (224, 16, None),
    }
    assert {int(spec.poison.rate * spec.dataset.options["train_images"]) for spec in cells} == {40}
