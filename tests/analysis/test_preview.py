"""The images and numbers of a preview, and its drawing read back pixel by pixel."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_MODEL, Tiny, tiny_spec

from backdoorbench_moe.analysis import preview as previews
from backdoorbench_moe.analysis.preview import Preview, preview_run, preview_spec, save_preview
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import ConfigError, DataError, RecordError, UnknownNameError
from backdoorbench_moe.ops.images import draw_images

SPEC = tiny_spec(trigger={"name": "square", "colour": "white"}, train={"epochs": 1})
DENSE = {"name": "preact_resnet18", "width": 8}


def train(tmp_path, **values) -> Run:
    return run_attack(tiny_spec(**{"train": {"epochs": 1}, **values}), output=tmp_path, twin=False)[0]


def cells(path, columns: int, rows: int) -> np.ndarray:
    """Read the cells of a drawing as (columns, rows, 32, 32, 3), and check that each pixel is drawn as 5x5 pixels."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    step = previews.CELL + previews.GAP
    assert picture.shape == (
        previews.TOP + rows * step + previews.BOTTOM,
        previews.LEFT + columns * step + previews.RIGHT,
        3,
    )
    found = np.empty((columns, rows, 160, 160, 3), np.uint8)
    for column in range(columns):
        for row in range(rows):
            top, left = previews.TOP + row * step, previews.LEFT + column * step
            found[column, row] = picture[top : top + 160, left : left + 160]
    small = found[:, :, 2::5, 2::5]
    assert np.array_equal(small.repeat(5, 2).repeat(5, 3), found)
    return small


def pixels(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def test_one_of_each_class_in_turn() -> None:
    labels = torch.tensor([2, 2, 2, 0, 0, 4, 2, 0])
    chosen = draw_images(labels, 8, seed=1)
    assert labels[chosen].tolist() == [0, 2, 4, 0, 2, 0, 2, 2]
    assert sorted(chosen.tolist()) == list(range(8))
    assert torch.equal(draw_images(labels, 5, seed=1), chosen[:5])
    assert len({tuple(draw_images(labels, 8, seed=seed).tolist()) for seed in range(10)}) > 5


def test_images_are_stamped_as_in_the_attack() -> None:
    preview = preview_spec(SPEC, images=5)
    test = Tiny().load().test
    assert preview.labels == ("red", "green", "blue", "red", "green")
    assert torch.equal(preview.clean, test.images[preview.indices])
    want = preview.clean.clone()
    want[:, :, :4, :4] = 255
    assert torch.equal(preview.triggered, want)
    change = (want.double() - preview.clean.double()).div(255).square().flatten(1).mean(1)
    torch.testing.assert_close(preview.psnr.double(), -10 * change.log10(), atol=1e-4, rtol=0)
    assert ((preview.ssim > 0) & (preview.ssim < 1)).all()
    assert preview.mean_psnr == pytest.approx(preview.psnr.mean().item())
    assert preview.selected is None


def test_the_split_and_the_models_patch_are_used() -> None:
    spec = tiny_spec(applicator="patch", trigger={"name": "square", "size": 1, "colour": "white"})
    preview = preview_spec(spec, images=3, split="train")
    assert torch.equal(preview.clean, Tiny().load().train.images[preview.indices])
    changed = (preview.clean != preview.triggered).any(1)
    assert not changed[:, 1:4].any() and (preview.triggered[:, :, ::4, ::4] == 255).all()


def test_the_drawing_shows_the_images_and_their_difference(tmp_path) -> None:
    preview = preview_spec(SPEC, images=4)
    save_preview(preview, tmp_path / "a.png", amplify=3)
    clean, triggered, difference = cells(tmp_path / "a.png", columns=3, rows=4)
    assert np.array_equal(clean, pixels(preview.clean))
    assert np.array_equal(triggered, pixels(preview.triggered))
    want = np.minimum(3 * np.abs(triggered.astype(int) - clean.astype(int)), 255)
    assert np.array_equal(difference, want) and want.max() == 255


def test_a_routed_model_shows_what_each_expert_saw(tmp_path) -> None:
    model = {
        **TINY_MODEL,
        "gate_std": 1.0,
    }  # Large enough that rounding does not decide which tile is selected.
    run = train(tmp_path, model=model, trigger={"name": "blend", "ratio": 0.2})
    preview = preview_run(run, images=2)
    save_preview(preview, tmp_path / "a.png")
    _, triggered, _, *experts = cells(tmp_path / "a.png", columns=7, rows=2)
    with torch.no_grad():
        routing = run.model().forward_routed(preview.triggered / 255).routing[0]
    selected = routing.selected.reshape(2, 4, 8, 8).numpy()
    for number, seen in enumerate(experts):
        lit = selected[:, number].repeat(4, 1).repeat(4, 2)[..., None]
        want = np.where(lit, triggered, np.round(triggered.astype(np.float32) * np.float32(0.15)))
        assert np.array_equal(seen, want) and not np.array_equal(seen, triggered)


def test_a_dense_model_has_no_experts_to_show(tmp_path) -> None:
    preview = preview_run(train(tmp_path, model=DENSE), images=2)
    assert preview.selected is None
    save_preview(preview, tmp_path / "a.png")
    cells(tmp_path / "a.png", columns=3, rows=2)


def test_psnr_of_unchanged_images_is_infinite() -> None:
    same = torch.tensor([math.inf, 20.0, math.inf, 30.0])
    blank = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    preview = Preview("", torch.arange(4), ("a",) * 4, blank, blank, same, torch.ones(4))
    assert preview.mean_psnr == 25 and replace(preview, psnr=same[:1]).mean_psnr == math.inf
    assert (previews.format_psnr(math.inf), previews.format_psnr(20.04)) == ("∞ dB", "20.0 dB")


@pytest.mark.parametrize(("side", "cell"), [(8, 160), (64, 128), (224, 224), (640, 320)])
def test_any_image_size_and_any_class_name(tmp_path, side, cell) -> None:
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    one = torch.ones(1)
    preview = Preview("$a$", torch.arange(1), ("$\\frac{x a very long name " * 9,), images, images, one, one)
    save_preview(preview, tmp_path / "a.PNG")
    width, height = Image.open(tmp_path / "a.PNG").size
    assert width == previews.LEFT + 3 * (cell + previews.GAP) + previews.RIGHT
    assert height == previews.TOP + cell + previews.GAP + previews.BOTTOM


def test_the_file_is_replaced_and_pyplot_is_left_alone(tmp_path, monkeypatch) -> None:
    preview, output = preview_spec(SPEC, images=1), tmp_path / "a.png"
    output.write_text("before")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    save_preview(preview, output)
    first = output.read_bytes()
    save_preview(preview, output)
    assert output.read_bytes() == first and first.startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert "matplotlib.pyplot" not in sys.modules


def test_a_file_that_cannot_be_written(tmp_path) -> None:
    with pytest.raises(RecordError, match=r"output .*a\.png: cannot be written"):
        save_preview(preview_spec(SPEC, images=1), tmp_path / "none" / "a.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images: expected 1 to 100, got 0"),
        ({"images": 61}, "images: expected at most the 60 test images, got 61"),
        ({"split": "tset"}, "split: unknown 'tset'; did you mean 'test'"),
    ],
)
def test_invalid_choices_of_images(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        preview_spec(SPEC, **options)


def test_specs_that_cannot_be_shown() -> None:
    with pytest.raises(ConfigError, match="got a run without one"):
        preview_spec(clean_twin(SPEC))
    with pytest.raises(UnknownNameError, match="did you mean 'square'"):
        preview_spec(tiny_spec(trigger="sqare"))


@pytest.mark.parametrize("amplify", [0.0, -1.0, math.nan, math.inf])
def test_wrong_factors_and_file_names(tmp_path, amplify) -> None:
    preview = preview_spec(SPEC, images=1)
    with pytest.raises(ConfigError, match="amplify: expected a number above 0"):
        save_preview(preview, tmp_path / "a.png", amplify=amplify)
    with pytest.raises(ConfigError, match=r"output: expected a file name that ends in \.png, got"):
        save_preview(preview, tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_runs_that_cannot_be_shown(tmp_path, monkeypatch) -> None:
    run = train(tmp_path)
    with pytest.raises(RecordError, match="expected a finished run, its status is 'interrupted'"):
        preview_run(Run(run.folder, replace(run.record, status="interrupted")))
    monkeypatch.setattr(Tiny, "offset", 1)
    with pytest.raises(DataError, match=r"tiny: expected the data of the run, digest .* give its folder"):
        preview_run(load_run(run.folder.path))
