"""`bbmoe preview`: what it prints, what it draws, what it refuses."""

from __future__ import annotations

import functools
import json

import pytest
from PIL import Image
from tiny import tiny_spec

from backdoorbench_moe.analysis import preview as previews
from backdoorbench_moe.engine.runner import run_attack

SMALL = ["--dataset", "tiny", "--images", "2"]


@pytest.fixture
def preview(bbmoe, monkeypatch, tmp_path):
    """Run `bbmoe preview` in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(bbmoe, "preview")


def columns(path) -> float:
    """Number of columns in a picture of 32x32 images."""
    width = Image.open(path).size[0] - previews.LEFT - previews.RIGHT
    return width / (previews.CELL + previews.GAP)


def test_a_picture_and_a_table(preview, tmp_path) -> None:
    code, out, err = preview(*SMALL)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "warp by patch (patch_size 4) on tiny, test images"
    assert [
        row for row in ("red", "green", "mean") if not any(row in line and "dB" in line for line in lines)
    ] == []
    assert lines[-1] == "picture: preview.png"
    assert columns(tmp_path / "preview.png") == 3


def test_json_is_all_that_is_printed(preview, tmp_path) -> None:
    flags = [
        "--trigger",
        "square",
        "--applicator",
        "image",
        "--split",
        "train",
        "--output",
        "a.png",
        "--json",
    ]
    code, out, _ = preview(*SMALL, *flags, "--set", "trigger.size=2")
    document = json.loads(out)
    assert code == 0 and document["output"] == "a.png" and document["experts"] is None
    assert [image["class"] for image in document["images"]] == ["red", "green"]
    values = [image["psnr"] for image in document["images"]]
    assert all(10 < value < 60 for value in values)
    assert document["mean"]["psnr"] == pytest.approx(sum(values) / 2)
    assert (tmp_path / "a.png").is_file()


def test_a_trigger_that_changes_nothing_has_no_psnr(preview, monkeypatch) -> None:
    from backdoorbench_moe.triggers.square import Square

    monkeypatch.setattr(Square, "stamp", lambda self, images: images.clone())
    _, out, _ = preview(*SMALL, "--trigger", "square", "--json")
    document = json.loads(out)
    assert document["mean"] == {"psnr": None, "ssim": 1.0}


def test_a_run_shows_its_own_trigger_and_experts(preview, tmp_path) -> None:
    [run] = run_attack(tiny_spec(train={"epochs": 1}), output=tmp_path, twin=False)
    code, out, _ = preview("--run", run.folder.path, "--images", 1, "--json")
    document = json.loads(out)
    assert code == 0 and document["experts"] == 4
    assert document["title"] == "square by image on tiny, test images"
    assert columns(tmp_path / "preview.png") == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--run", "x", "--trigger", "warp"], "expected no other settings, as the run's record has them"),
        (["--run", "x", "--trigger", "warp", "--seed", "1"], "got '--trigger --seed'"),
        (["--run", "x", "--set", "seed=1"], "got '--set'"),
        (["--run", "x"], "run folder x: expected a folder with a record.json"),
        ([*SMALL, "--output", "a.jpg"], "output: expected a file name that ends in .png, got 'a.jpg'"),
        ([*SMALL, "--output", "none/a.png"], "none/a.png: cannot be written: No such file or directory"),
        ([*SMALL, "--amplify", "nan"], "amplify: expected a number above 0, got nan"),
        ([*SMALL, "--split", "valid"], "split: unknown 'valid'"),
        ([*SMALL, "--images", "0"], "images: expected 1 to 100, got 0"),
        ([*SMALL, "--trigger", "wrap"], "trigger: unknown 'wrap'; did you mean 'warp'"),
        ([*SMALL, "--patch-size", "5"], "patch_size: expected a divisor of 32x32"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_written(preview, tmp_path, args, message) -> None:
    code, out, err = preview(*args)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("bbmoe: error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_data_root_is_the_one_setting_a_run_takes(preview, tmp_path) -> None:
    """ "tiny" has no root, which shows that the flag reached the data set."""
    [run] = run_attack(tiny_spec(train={"epochs": 1}), output=tmp_path / "runs", twin=False)
    code, _, err = preview("--run", run.folder.path, "--data-root", "elsewhere")
    assert (
        code == 2 and "--data-root (data_root=): expected none, as the data set 'tiny' is in no folder" in err
    )
