"""A result folder as BackdoorBench writes it, of an attack on the data set "tiny", with plain PyTorch code."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from backdoorbench_moe.data.base import ImageSet

TARGET, ARCHITECTURE = 1, "shufflenet_v2_x1_0"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def foreign_model(classes: int, architecture: str = ARCHITECTURE) -> nn.Module:
    """A small network of torchvision, as BackdoorBench builds it."""
    torch.manual_seed(3)
    return getattr(torchvision.models, architecture)(num_classes=classes).eval()


def stamp(images: Tensor, places: list[int]) -> Tensor:
    """A trigger without a formula that the package knows: noise of its own for each image."""
    stamped = images.clone()
    for row, place in enumerate(places):
        noise = torch.randint(0, 90, images.shape[1:], generator=torch.Generator().manual_seed(place))
        stamped[row] = (images[row].int() + noise).clamp(max=255).to(torch.uint8)
    return stamped


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """What the network calls uint8 images, normalised outside of it."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        return model((images.float() / 255 - mean) / std).argmax(1)


def write_split(
    folder: Path, images: Tensor, true: Tensor, new: Tensor, places: list[int], total: int
) -> dict[str, Any]:
    """Write the PNG files of stored images; returns the state that `attack_result.pt` has of them."""
    stored = {}
    for image, label, changed, place in zip(images, true.tolist(), new.tolist(), places, strict=True):
        path = folder / str(label) / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        stored[np.int64(place)] = {"path": f"/home/author/{path.name}", "other_info": [changed, label]}
    flags = np.zeros(total)
    flags[places] = 1
    return {
        "bd_data_container": {
            "save_folder_path": "/home/author",
            "data_dict": stored,
            "save_file_format": ".png",
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(total),
        "poison_indicator": flags,
        "save_folder_path": "/home/author",
    }


def write_result(folder: Path, images: ImageSet, architecture: str = ARCHITECTURE) -> dict[str, float]:
    """Write the folder; returns BA, ASR and RA as fractions, computed here."""
    folder.mkdir(parents=True)
    model, test, train = foreign_model(images.num_classes, architecture), images.test, images.train
    places = (test.labels != TARGET).nonzero().squeeze(1).tolist()
    triggered = stamp(test.images[places], places)
    poisoned = [3, 7, 20, 41]
    bd_test = write_split(
        folder / "bd_test_dataset",
        triggered,
        test.labels[places],
        torch.full((len(places),), TARGET),
        places,
        len(test),
    )
    bd_test["original_index_array"] = np.array(places)
    bd_train = write_split(
        folder / "bd_train_dataset",
        stamp(train.images[poisoned], poisoned),
        train.labels[poisoned],
        torch.full((4,), TARGET),
        poisoned,
        len(train),
    )
    values = {
        "model_name": architecture,
        "num_classes": images.num_classes,
        "model": model.state_dict(),
        "data_path": "./data/cifar10",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": bd_train,
        "bd_test": bd_test,
    }
    torch.save(values, folder / "attack_result.pt")
    torch.save(
        {"epochs": 3, "batch_size": 16, "lr": 0.02, "dataset": "cifar10", "img_size": (32, 32, 3)},
        folder / "info.pickle",
    )
    called = predict(model, triggered)
    numbers = {
        "test_acc": (predict(model, test.images) == test.labels).float().mean().item(),
        "test_asr": (called == TARGET).float().mean().item(),
        "test_ra": (called == test.labels[places]).float().mean().item(),
    }
    write_csv(folder / "attack_df.csv", [dict.fromkeys(numbers, 0.0), numbers])
    return numbers


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """Write a csv as pandas does, with the number of the epoch first."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["", *rows[0]])
        writer.writeheader()
        writer.writerows({"": number, **row} for number, row in enumerate(rows))
