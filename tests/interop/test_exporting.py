"""A run goes to BackdoorBench's folder and comes back with the same numbers; other tools' files."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from result_folders import write_result
from safetensors.torch import load_file
from tiny import Tiny
from torch import nn

import backdoorbench_moe as bbmoe
from backdoorbench_moe import data
from backdoorbench_moe.cli import bbmoe as command
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError
from backdoorbench_moe.interop import exporting
from backdoorbench_moe.interop.attack_result import read_attack_result
from backdoorbench_moe.interop.export_script import MODULE_SCRIPT, read_script
from backdoorbench_moe.interop.exporting import write_backdoorbench
from backdoorbench_moe.interop.importing import NORMALISATION, import_backdoorbench
from backdoorbench_moe.interop.toolbox import read_toolbox_set

# The test's data set is called "tiny", as is Tiny ImageNet in BackdoorBench.
MEAN, STD = NORMALISATION["tiny"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    data.registry.register("tiny")(Tiny)
    try:
        [made] = bbmoe.attack(
            model={"name": "backdoorbench", "architecture": "shufflenet_v2_x1_0", "mean": MEAN, "std": STD},
            trigger="square",
            applicator="image",
            dataset="tiny",
            poison={"rate": 0.25, "target": 2},
            train={"epochs": 1, "batch_size": 32},
            output=tmp_path_factory.mktemp("runs"),
            twin=False,
            device="cpu",
        )
    finally:
        data.registry.unregister("tiny")
    return made


def test_there_and_back(run: Run, tmp_path: Path) -> None:
    folder = write_backdoorbench(run, tmp_path / "record" / "square_1")
    assert not list(folder.rglob("*.p*t")) and not list(folder.rglob("*.pickle")), "a pickle was written"
    runpy.run_path(str(folder / "make_attack_result.py"))
    result = read_attack_result(folder / "attack_result.pt")
    assert len(result.test) == 40 and result.train is not None and len(result.train) == 24
    # What BackdoorBench's own reader is: plain torch.load, and the PNG file by its path.
    theirs = torch.load(folder / "attack_result.pt", weights_only=False)
    place, entry = next(iter(theirs["bd_test"]["bd_data_container"]["data_dict"].items()))
    image = np.asarray(Image.open(tmp_path / entry["path"]))
    assert (image[:4, :4] == 0).all() and entry["other_info"][0] == 2
    assert Tiny().load().test.labels[place] == entry["other_info"][1]
    [row] = csv.DictReader((folder / "attack_df.csv").open())
    assert float(row["test_asr"]) == pytest.approx(run.value("asr") / 100)
    back = import_backdoorbench(folder, dataset="tiny", output=tmp_path / "runs", device="cpu")
    assert {each.name: each.here for each in back.compared if each.name != "ra"} == {
        name: run.value(name) for name in ("ba", "asr")
    }
    assert back.run.model().normalisation == (MEAN, STD)
    model, other = run.model().state_dict(), back.run.model().state_dict()
    assert all(torch.equal(model[name], other[name]) for name in model)


def test_a_model_without_backdoorbenchs_normalisation_is_warned_of(run: Run, tmp_path: Path) -> None:
    model = {**run.record.spec["model"], "mean": [0, 0, 0], "std": [1, 1, 1]}
    plain = Run(run.folder, replace(run.record, spec={**run.record.spec, "model": model}))
    with pytest.warns(
        BbmoeWarning, match=r"this model was trained with mean \(0.0, 0.0, 0.0\) and std \(1.0"
    ):
        write_backdoorbench(plain, tmp_path / "out")


@pytest.mark.parametrize(
    ("dataset", "options"), [("gtsrb", {}), ("cifar10", {"mean": "cifar10"}), ("signs", {"mean": "half"})]
)
@pytest.mark.filterwarnings("error")
def test_a_model_with_backdoorbenchs_normalisation_is_not_warned_of(dataset, options, tmp_path) -> None:
    """On GTSRB, BackdoorBench does not normalise. How it normalises other data is unknown."""
    exporting._check_normalisation(PartSpec("pmoe", options), nn.Identity(), dataset, tmp_path)
    if options:
        with pytest.raises(BbmoeWarning, match=r"images of gtsrb by mean \(0.0, 0.0, 0.0\)"):
            exporting._check_normalisation(PartSpec("pmoe", options), nn.Identity(), "gtsrb", tmp_path)


def test_the_data_set_has_backdoorbenchs_name(run: Run) -> None:
    for ours, theirs in (("tiny-imagenet", "tiny"), ("gtsrb", "gtsrb"), ("signs", "signs")):
        facts = exporting._facts(run, replace(Tiny().load(), name=ours))
        assert facts["dataset"] == facts["info"]["dataset"] == theirs


def test_a_tensor_with_two_names_is_written_twice(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    exporting._write_weights(tmp_path, "own", model, {})
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["1.weight"], model[0].weight)


@pytest.mark.parametrize(
    "part", ["_write_test", "_write_train", "_write_weights", "_write_numbers", "read_script"]
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_an_interruption_leaves_no_half_filled_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, exists: bool
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, part, interrupt)
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_backdoorbench(run, target)
    assert list(tmp_path.rglob("*")) == [target] * exists
    monkeypatch.undo()
    assert (write_backdoorbench(run, target) / "facts.json").is_file()


def test_the_commands(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = CliRunner().invoke(
        command, ["export", str(run.folder.path), str(target), "--format", "backdoorbench"]
    )
    assert done.exit_code == 0 and (target / "facts.json").is_file(), done.output
    with pytest.raises(ConfigError, match="expected a folder that does not exist or is empty"):
        write_backdoorbench(run, target)
    folder = tmp_path / "record" / "noise"
    numbers = write_result(folder, Tiny().load())
    words = ["import", "backdoorbench", str(folder), "--dataset", "tiny", "--output", str(tmp_path / "runs")]
    done = CliRunner().invoke(command, [*words, "--device", "cpu", "--quiet"])
    assert done.exit_code == 0, done.output
    assert f"{100 * numbers['test_asr']:.2f}%" in done.output and "run: " in done.output


def test_a_run_without_a_trigger_is_not_exported(run: Run, tmp_path: Path) -> None:
    spec = {
        **run.record.spec,
        "trigger": None,
        "applicator": None,
        "poison": {**run.record.spec["poison"], "rate": 0.0},
    }
    clean = Run(run.folder, replace(run.record, spec=spec))
    with pytest.raises(ConfigError, match="expected an attacked run of one model with a trigger"):
        write_backdoorbench(clean, tmp_path / "out")


def test_a_poisoned_set_of_backdoor_toolbox_is_read(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 8, 8)
    torch.save(images, tmp_path / "imgs")
    torch.save(torch.tensor([0, 1, 2, 0, 1, 2]), tmp_path / "labels")
    torch.save([4, 1], tmp_path / "poison_indices")
    read = read_toolbox_set(tmp_path)
    assert torch.equal(read.train.images, (images * 255).round().byte())
    assert read.poison.tolist() == [1, 4] and not len(read.cover)
    torch.save(torch.tensor([6]), tmp_path / "cover_indices")
    with pytest.raises(DataError, match=r"cover_indices: expected places in 0\.\.5, got 6\.\.6"):
        read_toolbox_set(tmp_path)
    torch.save(images * 3, tmp_path / "imgs")
    with pytest.raises(DataError, match=r"imgs: expected pixels in \[0, 1\]"):
        read_toolbox_set(tmp_path)


def test_a_folder_of_trojai_is_refused_with_the_way_round(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"a whole pickled module.*interop\.export_script"):
        import_backdoorbench(tmp_path, output=tmp_path / "runs")
    script = tmp_path / "export.py"
    script.write_text(read_script(MODULE_SCRIPT))
    before, sys.argv = sys.argv, ["export.py", str(tmp_path / "model.pt"), str(tmp_path / "w.safetensors")]
    try:
        runpy.run_path(str(script))
    finally:
        sys.argv = before
    assert load_file(tmp_path / "w.safetensors")["weight"].shape == (3, 2)
