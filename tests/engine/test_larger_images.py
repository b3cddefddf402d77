"""Images of 64x64 and 224x224 from a folder, with tiles of the model's size and of a wrong one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_MODEL, tiny_spec
from torch import Tensor, nn

from backdoorbench_moe import models
from backdoorbench_moe.engine.build import build_stamper
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import ShapeError

SIDE = 64
MODEL = {**TINY_MODEL, "patch_size": 8}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told apart by colour: 12 training and 6 test images of each, 64x64, as PNG files."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("red", "green", "blue")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(20, 128, (SIDE, SIDE, 3), np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


def squares(size: int, patch: int) -> Tensor:
    """By hand: which pixels a square of 2x2 in the corner of every tile covers."""
    rows = torch.arange(size) % patch < 2
    return rows[:, None] & rows[None, :]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("applicator", "patch"),
    [("patch", 8), ({"name": "patch", "patch_size": 4}, 4), ({"name": "patch", "patch_size": 16}, 16)],
    ids=["the model's", "too small", "too large"],
)
def test_a_run_on_a_folder_of_64x64(pictures, tmp_path, applicator, patch) -> None:
    spec = tiny_spec(
        dataset={"name": "folder", "root": str(pictures), "image_size": SIDE},
        model=MODEL,
        trigger={"name": "square", "size": 2},
        applicator=applicator,
        train={"epochs": 2, "batch_size": 12, "lr": 0.05},
    )
    [done] = run_attack(spec, output=tmp_path, twin=False)
    run = load_run(done.folder.path)
    record = run.record
    assert record.status == "finished" and len(record.history) == 2
    assert record.data["image_size"] == SIDE and record.poison["n"] == 9
    assert record.parts["model"]["patch_size"] == 8
    assert record.parts["applicator"]["patch_size"] == patch
    assert record.metrics["ba"]["n"] == 18 and record.metrics["asr"]["n"] == 12
    # What the finished run stamps, opened anew from its folder.
    stamped = run.stamper()(torch.full((1, 3, SIDE, SIDE), 0.5))
    assert torch.equal(stamped[0, 0] == 0, squares(SIDE, patch))
    (routing,) = run.model().forward_routed(stamped).routing
    assert routing.selected.shape == (1, 4, 64)


@pytest.mark.parametrize("patch", [16, 32])
def test_224x224_in_tiles(patch) -> None:
    options = {} if patch == 16 else {"patch_size": patch}
    spec = tiny_spec(trigger={"name": "square", "size": 2}, applicator={"name": "patch", **options})
    stamp = build_stamper(spec, patch_size=16, image_size=224)
    stamped = stamp(torch.full((1, 3, 224, 224), 0.5))
    assert torch.equal(stamped[0, 2] == 0, squares(224, patch))
    assert (stamped[0, 2] == 0).sum() == 4 * (224 // patch) ** 2


def test_a_tile_that_does_not_cut_224_is_named_before_anything_is_trained() -> None:
    spec = tiny_spec(applicator={"name": "patch", "patch_size": 12})
    with pytest.raises(ShapeError, match=r"patch_size: expected a divisor of 224x224 .*, got 12"):
        build_stamper(spec, patch_size=16, image_size=224)


class Coarse(nn.Module):
    """Colours and nothing else, by tiles of 16x16, whose size stands in the class."""

    patch_size = 16

    def __init__(self, *, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        return self.head(images.mean((2, 3)))


@pytest.mark.slow
def test_a_patch_size_of_the_class_is_on_record(tmp_path) -> None:
    models.registry.register("coarse")(Coarse)
    try:
        spec = tiny_spec(model="coarse", applicator="patch", train={"epochs": 1, "batch_size": 32, "lr": 0.1})
        [run] = run_attack(spec, output=tmp_path, twin=False)
        stamper = load_run(run.folder.path).stamper()
    finally:
        models.registry.unregister("coarse")
    assert run.record.parts["applicator"]["patch_size"] == 16
    assert stamper.applicator.patch_size == 16
