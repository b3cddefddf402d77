"""Export the training set that a run used, and its weights, as plain files for other tools."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from backdoorbench_moe import models
from backdoorbench_moe.attacks.base import PoisonPlan
from backdoorbench_moe.attacks.training_control import TrainingControl
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.data.listing import order_classes
from backdoorbench_moe.data.text import TextDataset
from backdoorbench_moe.engine.build import build_dataset
from backdoorbench_moe.engine.opening.opened_run import load_run_images
from backdoorbench_moe.engine.poisoning.poison import poisoned
from backdoorbench_moe.engine.run import Run, check_data, check_finished, check_model
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.models.base import WritesCheckpoints
from backdoorbench_moe.records import RunFolder

# Names of the groups, by their number in a file of tensors.
GROUPS = ("clean", "poison", "cover", "noise")
FORMATS = ("png", "tensors")
FILES_CHUNK = 256
# What a network of timm has instead of the published stem, whose weights may have the same shapes.
SMALL_STEM = "the first convolution is 3x3 with stride 1; a max pooling before any other stride is left out"


@dataclass(frozen=True)
class ExportedSet:
    """The N training images of a run, as the victim's model was trained on them.

    Attributes:
        split: The images and labels, including the poisoned ones.
        original: (N,) int64, the true labels.
        groups: (N,) uint8, indices into `GROUPS`.
        classes: Names of the classes, by number.
    """

    split: Split
    original: Tensor
    groups: Tensor
    classes: tuple[str, ...]


def export_run(
    run: Run, folder: Path, *, form: str = "png", images: bool = True, data_root: str | None = None
) -> list[str]:
    """Write the training set and the weights of a finished run to a folder, which is written completely or not at all.

    Args:
        run: The run.
        folder: A folder that does not exist or is empty.
        form: "png" for class folders and a table `train.csv`, or "tensors" for one file `train.safetensors`.
        images: Whether to write the training set in addition to the weights.
        data_root: Folder of the data, if it has moved since the run.

    Returns:
        The names of the files and folders in `folder`.

    Raises:
        BbmoeError: The run or its data cannot be used, the run does not have exactly one training set, or the folder
            cannot be written.
    """
    if form not in FORMATS:
        raise ConfigError.expected("format", " or ".join(FORMATS), form)
    if run.record.is_text:
        raise ConfigError.expected("format", "'transformers', as the run is on texts", form)
    check_finished(run)
    check_folder(folder)
    if images:
        _check_one_set(run)
    weights, metadata = _weights(run)
    found = training_set(run, data_root) if images else None

    def write(place: Path) -> None:
        RunFolder(place).save_model(weights, metadata)
        facts = {
            "run": run.folder.path.name,
            "digest": run.record.digest,
            "classes": run.record.data["classes"],
        }
        if found is not None:
            (_write_png if form == "png" else _write_tensors)(found, place)
            facts |= {"groups": {name: int((found.groups == n).sum()) for n, name in enumerate(GROUPS)}}
        (place / "export.json").write_text(
            json.dumps({**facts, "model": metadata}, indent=2) + "\n", encoding="utf-8"
        )

    write_folder(folder, write)
    return sorted(path.name for path in folder.iterdir())


def export_checkpoint(run: Run, folder: Path, *, data_root: str | None = None) -> list[str]:
    """Write the model of a finished run on texts as a checkpoint in the format of transformers, with its tokenizer.

    Args:
        run: The run. Its model must be a `models.base.WritesCheckpoints`.
        folder: A folder that does not exist or is empty. It is written completely or not at all.
        data_root: Folder of the data, if the data set has one and it has moved since the run.

    Returns:
        The names of the files and folders in `folder`.

    Raises:
        BbmoeError: The run or its data cannot be used, the model does not support this format, or the folder cannot be
            written.
    """
    check_finished(run)
    check_folder(folder)
    model, spec = run.model(), run.located_spec()
    if not isinstance(model, WritesCheckpoints):
        expected = f"another format, which the model {spec.model.name} supports"
        raise ConfigError.expected("format", expected, "transformers")
    source = build_dataset(spec if data_root is None else spec.with_data(root=data_root))
    assert isinstance(source, TextDataset)
    texts = source.load()
    check_data(run.folder, run.record, texts)

    def write(place: Path) -> None:
        model.write_checkpoint(place, end=texts.end, header=run.folder.model_metadata())
        source.write_tokenizer(place)

    write_folder(folder, write)
    return sorted(path.name for path in folder.iterdir())


def training_set(run: Run, data_root: str | None = None) -> ExportedSet:
    """Return the training set of a run, including poisoned images and labels. Raises BbmoeError as `export_run`."""
    images = load_run_images(run, data_root)
    train, groups = images.train, torch.zeros(len(images.train), dtype=torch.uint8)
    original = train.labels.clone()
    if not run.spec.attacked:
        return ExportedSet(train, original, groups, images.classes)
    attack = run.attack()
    plan: PoisonPlan = attack(train.labels, num_classes=images.data_classes, seed=run.spec.seed)
    stamper = run.stamper() if attack.uses_trigger else None
    for name, indices in plan.groups.items():
        groups[indices] = GROUPS.index("poison" if name == "indices" else name)
        if not torch.equal(indices, torch.from_numpy(run.folder.load_poison(name))):
            raise RecordError(f"run folder {run.folder.path}: its poison indices are not those of its spec")
    with poisoned(train, plan, stamper) as split:
        return ExportedSet(split.copy(), original, groups, images.classes)


def _check_one_set(run: Run) -> None:
    spec, where = run.spec, f"run folder {run.folder.path}"
    if spec.mixture is not None or spec.policy:
        raise ConfigError(
            f"{where}: has no single training set, as it has a mixture or a policy; export only its weights"
        )
    if spec.attacked and isinstance(run.attack(), TrainingControl):
        raise ConfigError(f"{where}: the attacker poisoned every batch differently; export only its weights")


def _weights(run: Run) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under the names that other tools use, and the metadata for the header of their file."""
    tensors, metadata = run.folder.load_tensors()
    check_model(run)
    spec = run.spec
    prefix = getattr(models.registry.lookup(spec.model.name), "published_prefix", "")
    if prefix and spec.gate is None and all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    common = models.registry.common(spec.model.name, spec.model.options)
    # These are part of the model, but not of its weights.
    if common.normalisation is not None:
        metadata |= {
            name: json.dumps(values)
            for name, values in zip(("mean", "std"), common.normalisation, strict=True)
        }
    if common.resize is not None:
        metadata |= {"resize": str(common.resize)}
    if getattr(run.model(), "small_stem_weight", ""):
        metadata |= {"small_stem": SMALL_STEM}
    return tensors, metadata


def class_folders(classes: Sequence[str]) -> list[str]:
    """Names of the class folders: the class names, if the data set `folder` then numbers them in the same order.

    Otherwise, or if a class name is not a valid folder name, the class number is added as a prefix.
    """
    safe = ["".join(c if c.isalnum() or c in " ._-" else "_" for c in name).strip(". ") for name in classes]
    if (
        list(classes) == safe
        and order_classes(classes) == list(classes)
        and all(safe)
        and len(set(safe)) == len(safe)
    ):
        return safe
    digits = len(str(len(classes) - 1))
    return [f"{number:0{digits}}-{name}" for number, name in enumerate(safe)]


def _write_png(found: ExportedSet, place: Path) -> None:
    folders = [Path("train") / name for name in class_folders(found.classes)]
    for folder in folders:
        (place / folder).mkdir(parents=True, exist_ok=True)
    labels, digits = found.split.labels.tolist(), len(str(len(found.split) - 1))
    names = [folders[label] / f"{index:0{digits}}.png" for index, label in enumerate(labels)]

    def put(start: int) -> None:
        for index in range(start, min(start + FILES_CHUNK, len(names))):
            pixels = found.split.images[index].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(place / names[index])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(put, range(0, len(names), FILES_CHUNK)))
    original, groups = found.original.tolist(), found.groups.tolist()
    with (place / "train.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["index", "file", "label", "original_label", "group"])
        for index, name in enumerate(names):
            table.writerow([index, name.as_posix(), labels[index], original[index], GROUPS[groups[index]]])


def _write_tensors(found: ExportedSet, place: Path) -> None:
    tensors = {
        "images": found.split.images.contiguous(),
        "labels": found.split.labels,
        "original_labels": found.original,
        "group": found.groups,
    }
    texts = {"groups": json.dumps(list(GROUPS)), "classes": json.dumps(list(found.classes))}
    save_file(tensors, place / "train.safetensors", metadata=texts)


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless the folder does not exist or is empty, and can be replaced by another one."""
    try:
        if folder.resolve() in (Path.cwd(), Path(folder.anchor)):
            raise ConfigError.expected("DIR", "another folder than the current one", str(folder))
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise ConfigError.expected("DIR", "a folder that does not exist or is empty", str(folder))
    except OSError as error:
        raise ConfigError(f"DIR {folder}: {error.strerror}") from error


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder with `write` under a temporary name, then rename it to `folder`.

    Raises:
        RecordError: The folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        write(partial)
        partial.replace(folder)
    except OSError as error:
        raise RecordError(f"DIR {folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
