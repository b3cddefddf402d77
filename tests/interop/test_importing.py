"""A result of BackdoorBench becomes a run: its own numbers are met, and it can be defended and analyzed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from result_folders import TARGET, stamp, write_csv, write_result

import backdoorbench_moe as bbmoe
from backdoorbench_moe import data
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError, RecordError
from backdoorbench_moe.interop.attack_result import StoredSplit
from backdoorbench_moe.interop.comparison import Imported
from backdoorbench_moe.interop.importing import import_backdoorbench, read_plan, recipe
from backdoorbench_moe.interop.result_folder import ResultFolder
from backdoorbench_moe.records import RunFolder


@pytest.fixture(scope="module")
def images() -> data.ImageSet:
    from tiny import Tiny

    return Tiny().load()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, images: data.ImageSet) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("record") / "noise_1"
    return folder, write_result(folder, images)


@pytest.fixture
def imported(result: tuple[Path, dict[str, float]], tmp_path: Path) -> Imported:
    return import_backdoorbench(result[0], dataset="tiny", output=tmp_path / "runs", device="cpu")


def test_its_own_numbers_are_met(imported: Imported, result: tuple[Path, dict[str, float]]) -> None:
    folder, numbers = result
    assert imported.source == folder / "attack_df.csv"
    for each, theirs in zip(imported.compared, numbers.values(), strict=True):
        assert each.here == pytest.approx(100 * theirs, abs=1e-3) == each.there
    record = imported.run.record
    assert record.environment["precision"] == "fp32"
    # One of the four stored training images is of the target class, and poison nevertheless.
    assert record.poison is not None and (record.poison["n"], record.poison["target"]) == (4, TARGET)
    assert imported.run.spec.train.batch_size == 16 and imported.run.spec.train.lr == 0.02


@pytest.mark.slow
def test_a_network_whose_head_is_a_convolution(images: data.ImageSet, tmp_path: Path) -> None:
    numbers = write_result(tmp_path / "record", images, "squeezenet1_0")
    found = import_backdoorbench(tmp_path / "record", dataset="tiny", output=tmp_path / "runs", device="cpu")
    assert [each.here for each in found.compared] == pytest.approx(
        [100 * value for value in numbers.values()]
    )
    with pytest.raises(ConfigError, match="squeezenet1_0, whose head is a convolution"):
        bbmoe.defend(found.run, "spectral")
    assert len(bbmoe.defend(found.run, "fst", epochs=1).record.stages) == 3


def test_a_folder_that_is_no_result_is_named(result: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, says in (
        ("none", "does not exist"),
        ("file", "is a file"),
        (".", "attack_result.pt, which is not"),
    ):
        with pytest.raises(DataError, match=f"^FOLDER .*expected a result folder of BackdoorBench.*{says}"):
            import_backdoorbench(tmp_path / name, dataset="tiny", output=tmp_path / "runs")
    with pytest.raises(ConfigError, match="defense: unknown 'anp'"):
        import_backdoorbench(result[0], defense="anp", dataset="tiny", output=tmp_path / "runs")


def test_the_run_is_whole_without_the_folder(
    imported: Imported, images: data.ImageSet, tmp_path: Path
) -> None:
    """Its images lie in the run folder, which may be moved; nothing of the author's paths is used."""
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    run = bbmoe.load_run(next((tmp_path / "moved").glob("*/record.json")).parent)
    places = (images.test.labels != TARGET).nonzero().squeeze(1)
    clean = images.test.images[places]
    stamped = (run.stamper()(clean / 255) * 255).round().to(torch.uint8)
    assert torch.equal(stamped, stamp(clean, places.tolist()))
    held = images.train.images[[7]]
    training = run.stamper().training(held / 255, torch.tensor([7]))
    assert torch.equal((training * 255).round().to(torch.uint8), stamp(held, [7]))


@pytest.mark.slow
def test_it_can_be_defended_and_analyzed(imported: Imported) -> None:
    defended = bbmoe.defend(imported.run, "clp")
    assert defended.record.stages[0]["metrics"]["asr"] == imported.run.record.metrics["asr"]
    assert not list(defended.folder.path.glob("files/model*")), "a pickle was copied into a run folder"
    spectral = bbmoe.defend(imported.run, "spectral")
    counts = spectral.record.judgements[0]["counts"]
    assert counts["tp"] + counts["fn"] == 4
    bbmoe.analyze(imported.run, carriers_images=20)


def test_it_is_imported_once_and_not_trained(
    imported: Imported, result: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    again = import_backdoorbench(result[0], dataset="tiny", output=tmp_path / "runs", device="cpu")
    assert again.run.folder.path == imported.run.folder.path
    assert again.run.record.to_json() == imported.run.record.to_json()
    with pytest.raises(ConfigError, match="an imported model is not trained again"):
        run_attack(imported.run.located_spec(), output=tmp_path / "other", twin=False)


def test_another_model_can_be_trained_on_the_stored_poison(imported: Imported, tmp_path: Path) -> None:
    from tiny import TINY_MODEL

    spec = imported.run.located_spec()
    files = {name: getattr(spec, name).options["file"] for name in ("attack", "trigger")}
    [run] = bbmoe.attack(
        model=TINY_MODEL,
        trigger={"name": "stored", "file": files["trigger"]},
        applicator="image",
        attack={"name": "recorded", "file": files["attack"]},
        dataset="tiny",
        output=tmp_path / "runs",
        twin=False,
        poison={"target": TARGET, "rate": 4 / 96},
        train={"epochs": 1, "batch_size": 32},
        device="cpu",
    )
    assert run.record.poison is not None and run.record.poison["n"] == 4


@pytest.mark.parametrize(
    ("target", "labels", "poison", "noise"),
    [
        (1, [1, 1, 1], [3, 5, 8], []),  # Dirty labels; image 5 is of the target class.
        (1, [1, 1, 2], [3], [5, 8]),  # Image 8 keeps its label, so there is noise.
        (None, [1, 2, 0], [3, 5, 8], []),  # All-to-all, of three classes.
        (None, [1, 1, 0], [3, 8], [5]),
    ],
)
def test_the_groups_of_stored_training_images(
    target: int | None, labels: list[int], poison: list[int], noise: list[int]
) -> None:
    split = StoredSplit(np.array([3, 5, 8]), np.array(labels), np.array([0, 1, 2]), 10)
    plan = read_plan(split, target, 3)
    assert plan.indices.tolist() == poison and plan.noise.tolist() == noise and not len(plan.cover)


@pytest.mark.parametrize(
    ("dataset", "info", "augment"),
    [("cifar10", None, "crop-flip"), ("gtsrb", None, "crop"), ("cifar10", {"dataset": "tiny"}, "crop")],
)
def test_images_are_flipped_on_cifar10_only(dataset, info, augment, tmp_path: Path) -> None:
    """Without `info.pickle`, the name in `attack_result.pt` decides: a flipped traffic sign can be another sign."""
    if info is not None:
        torch.save(info, tmp_path / "info.pickle")
    assert recipe(ResultFolder(tmp_path), dataset).augment == augment


def test_clean_labels_are_poison() -> None:
    ones = np.ones(2, np.int64)
    assert read_plan(StoredSplit(np.array([2, 4]), ones, ones, 10), 1, 3).indices.tolist() == [2, 4]


def changed(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "changed"))


def refused(folder: Path, tmp_path: Path, match: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error, match=match):
        import_backdoorbench(folder, dataset="tiny", output=tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("column", "advice"),
    [
        ("test_acc", "the clean test images"),
        ("test_asr", "the images in bd_test_dataset"),
        ("", "the weights, which"),
    ],
)
def test_other_numbers_are_an_error_that_says_where_to_look(
    result: tuple[Path, dict[str, float]], tmp_path: Path, column: str, advice: str
) -> None:
    folder, numbers = changed(result[0], tmp_path), result[1]
    off = {name: abs(value - 0.5) if column in (name, "") else value for name, value in numbers.items()}
    write_csv(folder / "attack_df.csv", [off])
    refused(folder, tmp_path, rf"attack_df\.csv: the run .* here and .* there.* Look at: {advice}")


def test_broken_folders_are_refused_before_anything_is_written(
    result: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder = changed(result[0], tmp_path)
    image = next((folder / "bd_test_dataset").rglob("*.png"))
    for name, fault, put in (
        ("a link", "got a link", lambda: image.symlink_to(result[0] / "attack_df.csv")),
        ("nothing", "not found", lambda: None),
        ("a text", "expected a PNG image", lambda: image.write_text("text")),
        ("a large image", r"expected 32x32 pixels, got 64x64", lambda: _draw(image, 64)),
    ):
        image.unlink(missing_ok=True)
        put()
        refused(folder, tmp_path, rf"{image.name}: .*{fault}")
        assert not (tmp_path / "out").exists(), name


def _draw(path: Path, side: int) -> None:
    from PIL import Image

    Image.new("RGB", (side, side)).save(path)


def test_weights_are_matched_by_name_and_never_by_position(
    result: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder = changed(result[0], tmp_path)
    values = torch.load(folder / "attack_result.pt", weights_only=False)
    weights = dict(values["model"])
    first = next(iter(weights))
    weights = {("stem.weight" if name == first else name): tensor for name, tensor in weights.items()}
    weights["fc.bias"] = torch.zeros(7)
    torch.save({**values, "model": weights}, folder / "attack_result.pt")
    faults = rf"1 missing: {first}; 1 unexpected: stem\.weight; .* fc\.bias \(expected 3, got 7\)"
    refused(folder, tmp_path, faults, RecordError)
    together = {f"module.{name}": tensor for name, tensor in values["model"].items()}
    torch.save({**values, "model": together}, folder / "attack_result.pt")
    assert import_backdoorbench(folder, dataset="tiny", output=tmp_path / "out", device="cpu").compared


def test_a_training_set_that_was_made_afterwards_is_warned_of(
    result: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder = changed(result[0], tmp_path)
    torch.save({"attack": "wanet", "epochs": 3}, folder / "info.pickle")
    with pytest.warns(BbmoeWarning, match="stored training set was made afterwards"):
        import_backdoorbench(folder, dataset="tiny", output=tmp_path / "out", device="cpu")


def test_other_data_are_refused(result: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder = changed(result[0], tmp_path)
    values = torch.load(folder / "attack_result.pt", weights_only=False)
    next(iter(values["bd_test"]["bd_data_container"]["data_dict"].values()))["other_info"] = [TARGET, TARGET]
    torch.save(values, folder / "attack_result.pt")
    refused(
        folder,
        tmp_path,
        r"the test images are in another order than those of tiny: image 0 has label 1 there",
    )
    with pytest.raises(DataError, match=r"expected a result on the 30 test images .* got one on 60"):
        import_backdoorbench(
            result[0], dataset="tiny", data_options={"test_images": 30}, output=tmp_path / "out"
        )
    assert not RunFolder(tmp_path / "out").exists
