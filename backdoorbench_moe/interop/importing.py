"""Importing a result of BackdoorBench as a run: the model, its poisoned images, and its metrics, measured again."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from backdoorbench_moe import data
from backdoorbench_moe.attacks.base import PoisonPlan
from backdoorbench_moe.attacks.recorded import write_plan
from backdoorbench_moe.config import PartSpec, PoisonSpec, RunSpec, TrainSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.fitting import Checkpoint
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import Run, check_model, load_run
from backdoorbench_moe.engine.weights.fitting import fit_weights
from backdoorbench_moe.engine.weights.reading import Weights
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeWarning, DataError
from backdoorbench_moe.interop.attack_result import (
    INFO,
    AttackResult,
    DefenseResult,
    StoredSplit,
    read_attack_result,
    read_defense_result,
    read_info,
)
from backdoorbench_moe.interop.comparison import Imported, compare
from backdoorbench_moe.interop.result_folder import ATTACK, TEST_IMAGES, TRAIN_IMAGES, ResultFolder
from backdoorbench_moe.interop.toolbox import refuse_trojai
from backdoorbench_moe.models.common import NORMALISATIONS, Colour
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.triggers.stored import write_stored

# As BackdoorBench measures.
PRECISION: Literal["fp32"] = "fp32"
# Mean and standard deviation by BackdoorBench's name of the data set. Images of other data sets are not normalised.
NORMALISATION: dict[str, tuple[Colour, Colour]] = {
    "cifar10": NORMALISATIONS["cifar10"],
    "cifar100": NORMALISATIONS["cifar100"],
    "tiny": NORMALISATIONS["tiny-imagenet"],
    "gtsrb": NORMALISATIONS["none"],
}
# Names of the data sets in this package by BackdoorBench's names; others must be given.
DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "tiny": "tiny-imagenet", "gtsrb": "gtsrb"}
# Attacks of BackdoorBench that poison other images in every batch; their training images are stored afterwards.
REDRAWN = ("wanet", "bpp", "inputaware", "lira")


def import_backdoorbench(
    folder: Path | str,
    *,
    defense: str | None = None,
    dataset: str | None = None,
    data_options: Mapping[str, object] | None = None,
    data_root: str | None = None,
    normalisation: tuple[Colour, Colour] | None = None,
    output: Path | str = "runs",
    device: str = "auto",
    observer: Observer | None = None,
) -> Imported:
    """Import a result folder of BackdoorBench as a run, and measure it.

    Args:
        folder: The folder with `attack_result.pt`.
        defense: Name of a defense in the folder, to import the defended model; None for the attacked model.
        dataset: Name of the clean data set; None for the one in the result.
        data_options: Options of the data set, such as `train_images` if the result used a subset.
        data_root: Folder of the data set.
        normalisation: Mean and standard deviation of each channel, for images in [0, 1]; None for those that
            BackdoorBench uses for the data set.
        output: Folder of run folders.
        device: Device to compute on.
        observer: Receives progress.

    Returns:
        The run, and its metrics with those of BackdoorBench. An existing import is only read.

    Raises:
        BbmoeError: The folder, the data or an option cannot be used; or a metric differs from BackdoorBench's by more
            than half a percentage point.
    """
    place = ResultFolder(Path(folder), defense)
    refuse_trojai(place.path)
    place.check()
    attack = read_attack_result(place.path / ATTACK)
    side = _side(place, attack)
    result = attack if defense is None else read_defense_result(place.weights_file)
    part = _dataset(attack, dataset, dict(data_options or {}), side, data_root)
    workplace = Workplace(_clean_spec(part, device), observer)
    check_labels(place, attack, images := workplace.images)
    poison, plan = read_poison(place, attack, images)
    _warn_of_redrawn(place, plan)
    with tempfile.TemporaryDirectory(prefix="bbmoe-import-") as temporary:
        files = _write_files(Path(temporary), place, attack, images, plan, side)
        spec = workplace.resolve(
            RunSpec(
                dataset=part,
                model=_model(result, attack, place, normalisation),
                attack=PartSpec("recorded", {"file": str(files["plan"])} if plan is not None else {}),
                trigger=PartSpec("stored", {"file": str(files["images"])}),
                applicator=PartSpec("image"),
                poison=poison,
                train=recipe(place, attack.dataset),
                device=device,
                precision=PRECISION,
                recipe="backdoorbench",
            )
        )
        return compare(_make(spec, workplace, RunFolder(Path(output) / spec.name), result), place)


def _clean_spec(dataset: PartSpec, device: str) -> RunSpec:
    """Return a clean spec with the data, device and precision of the imported run."""
    clean = PoisonSpec(rate=0.0)
    return RunSpec(
        dataset=dataset,
        attack=None,
        trigger=None,
        applicator=None,
        poison=clean,
        device=device,
        precision=PRECISION,
    )


def _side(place: ResultFolder, attack: AttackResult) -> int:
    height, width, channels = attack.image_size
    if height != width or channels != 3:
        raise DataError(
            f"{place.path / ATTACK}: img_size: expected square images of 3 channels, got {height}x{width}x{channels}"
        )
    return height


def _dataset(
    attack: AttackResult, dataset: str | None, options: dict[str, Any], side: int, data_root: str | None
) -> PartSpec:
    if dataset is None and attack.dataset not in DATASETS:
        raise DataError(
            f"dataset: {attack.dataset!r} of BackdoorBench is not known by name (known: {', '.join(DATASETS)}); "
            "name its images with --dataset, such as folder"
        )
    name = dataset or DATASETS[attack.dataset]
    if "image_size" in data.registry.options(name):
        options.setdefault("image_size", side)
    if data_root is not None:
        options["root"] = data_root
    return PartSpec(name, options)


def check_labels(place: ResultFolder, attack: AttackResult, images: ImageSet) -> None:
    """Check that the clean data match a result: the same number of images in the same order.

    Raises:
        DataError: The number of images or classes differs, or a stored image has another label in the data set.
    """
    file = place.path / ATTACK
    if images.num_classes != attack.num_classes:
        raise DataError(
            f"{file}: expected a result for the {images.num_classes} classes of {images.name}, got {attack.num_classes}"
        )
    for name, stored, split in (("test", attack.test, images.test), ("training", attack.train, images.train)):
        if stored is None:
            continue
        if stored.images != len(split):
            raise DataError(
                f"{file}: expected a result on the {len(split)} {name} images of {images.name}, "
                f"got one on {stored.images}"
            )
        labels = split.labels.cpu().numpy()[stored.indices]
        if (wrong := (labels != stored.true).nonzero()[0]).size:
            first = wrong[0]
            raise DataError(
                f"{file}: the {name} images are in another order than those of {images.name}: image "
                f"{stored.indices[first]} has label {stored.true[first]} there and {labels[first]} here, and "
                f"{len(wrong) - 1} more differ"
            )
    if not len(attack.test):
        raise DataError(f"{file}: bd_test: expected triggered test images, got none")


def read_poison(
    place: ResultFolder, attack: AttackResult, images: ImageSet
) -> tuple[PoisonSpec, PoisonPlan | None]:
    """Return the poison settings, and the modified training images; None if these are not known.

    Raises:
        DataError: The labels of the triggered test images are neither a single target class nor the next class.
    """
    test, classes = attack.test, attack.num_classes
    targets = set(test.labels.tolist())
    values: dict[str, Any] = {"rate": 0.0}
    if (test.labels == (test.true + 1) % classes).all() and len(targets) > 1:
        values |= {"mapping": "all-to-all"}
    elif len(targets) == 1:
        values |= {"target": targets.pop()}
        labels = images.test.labels.cpu().numpy()
        sources = sorted(set(test.true.tolist()))
        if len(sources) < classes - 1:
            values |= {"source": tuple(sources)}
        expected = sum(int((labels == source).sum()) for source in sources)
        if values["target"] in sources or expected != len(test):
            raise DataError(
                f"{place.path / ATTACK}: bd_test: expected all {expected} test images of the classes {sources}, "
                f"without the target {values['target']}, got {len(test)}"
            )
    else:
        raise DataError(
            f"{place.path / ATTACK}: bd_test: expected one target class, or the next class for each image"
        )
    plan = None if attack.train is None else read_plan(attack.train, values.get("target"), classes)
    if plan is not None and attack.train is not None:
        count = attack.train.images
        values |= {"rate": len(plan.indices) / count, "noise": len(plan.noise) / count}
        if len(plan.indices) and (attack.train.labels == attack.train.true).all():
            values["labels"] = "clean"
    return PoisonSpec(**values), plan


def read_plan(train: StoredSplit, target: int | None, classes: int) -> PoisonPlan:
    """Return the groups of stored training images.

    If all images have the label that the attacker wants, all are poison images, including those of the target class.
    Otherwise images that keep their label are noise images, and the others are poison images.

    Args:
        train: The stored images.
        target: The target class; None for the next class of each image.
        classes: Number of classes.
    """
    indices, labels, true = map(torch.from_numpy, (train.indices, train.labels, train.true))
    wanted = (true + 1) % classes if target is None else torch.full_like(true, target)
    if torch.equal(labels, wanted):
        return PoisonPlan(indices, labels)
    poison = labels != true
    return PoisonPlan(indices[poison], labels[poison], noise=indices[~poison])


def _write_files(
    folder: Path,
    place: ResultFolder,
    attack: AttackResult,
    images: ImageSet,
    plan: PoisonPlan | None,
    side: int,
) -> dict[str, Path]:
    files = {"plan": folder / "plan.safetensors", "images": folder / "images.safetensors"}
    test, train = attack.test, attack.train
    places, training = torch.empty(0, dtype=torch.int64), torch.empty(0, 3, side, side, dtype=torch.uint8)
    if plan is not None and train is not None:
        write_plan(files["plan"], plan)
        places, training = torch.from_numpy(train.indices), place.images(TRAIN_IMAGES, train, side)
    clean = images.test.images[torch.from_numpy(test.indices).to(images.test.images.device)].cpu()
    write_stored(files["images"], clean, place.images(TEST_IMAGES, test, side), places, training)
    return files


def _model(
    result: AttackResult | DefenseResult,
    attack: AttackResult,
    place: ResultFolder,
    normalisation: tuple[Colour, Colour] | None,
) -> PartSpec:
    normalisation = normalisation or NORMALISATION.get(attack.dataset)
    options: dict[str, Any] = {"architecture": result.model, "weights": str(place.weights_file.absolute())}
    if normalisation is not None:
        options["mean"], options["std"] = map(list, normalisation)
    else:
        warnings.warn(
            f"{place.path}: the normalisation of {attack.dataset!r} is not known, so images are not normalised; "
            "give it with --mean and --std (normalisation=)",
            BbmoeWarning,
            stacklevel=3,
        )
    return PartSpec("backdoorbench", options)


def _warn_of_redrawn(place: ResultFolder, plan: PoisonPlan | None) -> None:
    """Warn if the stored training set was written after training and is not what the model was trained on."""
    path = place.path / INFO
    name = read_info(path).get("attack") if path.exists() else None
    if plan is not None and name in REDRAWN:
        warnings.warn(
            f"{place.path}: in the attack {name!r} other images are poisoned in every batch; the stored training set "
            "was made afterwards, and what a defense finds in it is not what the model was trained on",
            BbmoeWarning,
            stacklevel=3,
        )


def recipe(place: ResultFolder, dataset: str) -> TrainSpec:
    """Return BackdoorBench's training recipe, which defenses use, with settings from `info.pickle` if it exists.

    Args:
        place: The result folder.
        dataset: BackdoorBench's name of the data set, unless `info.pickle` gives it. Only cifar10 is flipped.
    """
    path = place.path / INFO
    info = read_info(path) if path.exists() else {}
    names = {
        "epochs": "epochs",
        "batch_size": "batch_size",
        "lr": "lr",
        "momentum": "sgd_momentum",
        "weight_decay": "wd",
    }
    given = {name: info[key] for name, key in names.items() if key in info}
    flips = info.get("dataset", dataset) == "cifar10"
    defaults = {"epochs": 100, "batch_size": 128, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    values: dict[str, Any] = {**defaults, **given}
    return TrainSpec(schedule="cosine", augment="crop-flip" if flips else "crop", **values)


class ResultMaker(Maker):
    """Creates the run of an imported result: loads and measures the model, without training.

    Args:
        spec: The run's spec.
        workplace: The data, the device, the precision and the observer.
        result: The result, with the weights.
    """

    keeps_trigger_files = True  # The stored images are part of the run.

    def __init__(self, spec: RunSpec, workplace: Workplace, result: AttackResult | DefenseResult) -> None:
        super().__init__(spec, workplace)
        self._weights: Mapping[str, Tensor] = result.weights

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the weights. Raises RecordError if they do not fit."""
        file = Path(str(self.spec.model.options["weights"]))
        for note in fit_weights(self.setup.model, Weights(file, self._weights, {})):
            self.workplace.observer.on_message(f"{file.name}: {note}")

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Measure the model and save it."""
        started, model = time.perf_counter(), self.setup.model
        model.to(self.workplace.device).to(memory_format=torch.channels_last).eval()
        if self.setup.plan is not None:
            folder.save_poison({name: group.numpy() for name, group in self.setup.plan.groups.items()})
        [record.metrics] = self.measure([model], recovery=True)
        record.timing["evaluate_seconds"] = record.timing["total_seconds"] = time.perf_counter() - started
        folder.save_model(model.state_dict(), self.model_header(record))


def _make(
    spec: RunSpec, workplace: Workplace, folder: RunFolder, result: AttackResult | DefenseResult
) -> Run:
    if folder.exists and folder.read().status == "finished":
        workplace.observer.on_found(str(folder.path))
        run = load_run(folder.path)
        check_model(run)
        return run
    maker = ResultMaker(spec, workplace, result)
    maker.prepare({})
    with folder.lock():
        return maker.make(folder, {})
