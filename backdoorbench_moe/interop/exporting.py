"""Exporting a run as a result folder of BackdoorBench: PNG files, a CSV file, and a script that writes the pickle."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine.exporting import check_folder, write_folder
from backdoorbench_moe.engine.poisoning.poison import poisoned
from backdoorbench_moe.engine.run import Run, check_finished
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeWarning, ConfigError
from backdoorbench_moe.interop.export_script import RESULT_SCRIPT, read_script
from backdoorbench_moe.interop.importing import DATASETS, NORMALISATION
from backdoorbench_moe.interop.result_folder import COLUMNS, TEST_IMAGES, TRAIN_IMAGES
from backdoorbench_moe.models import registry
from backdoorbench_moe.models.backdoorbench import BackdoorBenchModel
from backdoorbench_moe.models.common import NORMALISATIONS


def write_backdoorbench(run: Run, folder: Path | str, *, data_root: str | None = None) -> Path:
    """Write a run as BackdoorBench's result folder.

    No pickle is written: the script `make_attack_result.py` in the folder writes `attack_result.pt` where BackdoorBench
    runs. BackdoorBench can build the model only if it is one of its own architectures (`backdoorbench:...`). With any
    other model its tools can use the images and the CSV file, and the script uses this package's name of the model.

    Args:
        run: A finished, attacked run of one model, with a trigger.
        folder: The folder, which must not exist or be empty. It is written completely or not at all.
        data_root: Folder of the data set; None for the folder that the run used.

    Returns:
        The folder.

    Raises:
        ConfigError: The run has no attack with a trigger, or is a mixture; or the folder is not empty.
        RecordError: The run is not finished, or the folder cannot be written.
    """
    check_finished(run)
    spec, target = run.located_spec(), Path(folder)
    if not spec.attacked or spec.trigger is None or spec.mixture is not None:
        raise ConfigError(
            f"{run.folder.path}: expected an attacked run of one model with a trigger to export"
        )
    check_folder(target)
    if data_root is not None:
        spec = spec.with_data(root=data_root)
    workplace = Workplace(spec)
    setup = ImageSetup(spec, workplace.images)
    setup.stamper = run.stamper()
    model, facts = run.model(), _facts(run, workplace.images)
    _check_normalisation(run.spec.model, model, facts["dataset"], target)

    def write(place: Path) -> None:
        facts["bd_test"] = _write_test(place, setup)
        facts["bd_train"] = _write_train(place, setup, workplace.images)
        _write_weights(place, run.spec.model.name, model, facts)
        _write_numbers(place / "attack_df.csv", run)
        (place / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (place / RESULT_SCRIPT).write_text(read_script(RESULT_SCRIPT), encoding="utf-8")

    write_folder(target, write)
    return target


def _facts(run: Run, images: ImageSet) -> dict[str, Any]:
    train, poison = run.spec.train, run.spec.poison
    name = next((theirs for theirs, ours in DATASETS.items() if ours == images.name), images.name)
    info = {
        "dataset": name,
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "lr": train.lr,
        "sgd_momentum": train.momentum,
        "wd": train.weight_decay,
        "attack": "none" if run.spec.trigger is None else run.spec.trigger.name,
        "pratio": poison.rate,
        "attack_target": poison.target,
        "attack_label_trans": "all2one" if poison.mapping == "all-to-one" else "all2all",
    }
    size = images.image_size
    return {"num_classes": images.num_classes, "img_size": [size, size, 3], "dataset": name, "info": info}


def _write_test(target: Path, setup: ImageSetup) -> dict[str, Any]:
    triggered = setup.triggered_test()
    assert triggered is not None
    _write_images(target / TEST_IMAGES, triggered.images, triggered.true, triggered.places)
    return {
        "indices": triggered.places.tolist(),
        "labels": triggered.wanted.tolist(),
        "true": triggered.true.tolist(),
        "images": len(setup.images.test),
        "only_changed": True,
    }


def _write_train(target: Path, setup: ImageSetup, images: ImageSet) -> dict[str, Any] | None:
    plan, train = setup.plan, images.train
    assert plan is not None
    changed = torch.cat(list(plan.groups.values())).sort().values
    if not len(changed):  # The attack poisons batches, or the training set is not known.
        return None
    place = changed.to(train.labels.device)
    true = train.labels[place].clone()
    with poisoned(train, plan, setup.stamper) as split:
        seen = Split(split.images[place].clone(), split.labels[place].clone())
    _write_images(target / TRAIN_IMAGES, seen.images, true, changed)
    return {
        "indices": changed.tolist(),
        "labels": seen.labels.tolist(),
        "true": true.tolist(),
        "images": len(train),
        "only_changed": False,
    }


def _write_images(folder: Path, images: Tensor, labels: Tensor, places: Tensor) -> None:
    """Write images as <label>/<place>.png."""
    for label in labels.unique().tolist():
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    for row, label, place in zip(rows, labels.tolist(), places.tolist(), strict=True):
        Image.fromarray(row).save(folder / str(label) / f"{place}.png")


def _write_weights(target: Path, name: str, model: nn.Module, facts: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    weights = model.state_dict()
    facts["model_name"] = name
    if isinstance(model, BackdoorBenchModel):
        facts["model_name"] = model.architecture
        weights = {model.their_name(name): tensor for name, tensor in weights.items()}
    facts["weights"] = list(weights)
    # Cloned, because the format does not support shared tensors, such as one that a model has under two names.
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    save_file(plain, target / "weights.safetensors")


def _check_normalisation(part: PartSpec, model: nn.Module, dataset: str, target: Path) -> None:
    """Warn if BackdoorBench's normalisation of images is not the one that the model expects."""
    theirs = NORMALISATION.get(dataset)
    if isinstance(model, BackdoorBenchModel):
        own = model.normalisation
    else:
        own = registry.common(part.name, part.options).normalisation or NORMALISATIONS["none"]
    if theirs is None or own == theirs:
        return
    warnings.warn(
        f"{target}: BackdoorBench normalises images of {dataset} by mean {theirs[0]} and std {theirs[1]} before the "
        f"model, and this model was trained with mean {own[0]} and std {own[1]}; train backdoorbench:... with "
        "BackdoorBench's as model.mean and model.std",
        BbmoeWarning,
        stacklevel=3,
    )


def _write_numbers(path: Path, run: Run) -> None:
    """Write the metrics as BackdoorBench does, as fractions by epoch, but for the last epoch only."""
    metrics = run.record.metrics
    row = {column: metrics[name]["value"] / 100 for name, column in COLUMNS.items() if name in metrics}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["", *row])
        writer.writeheader()
        writer.writerow({"": run.spec.train.epochs - 1, **row})
