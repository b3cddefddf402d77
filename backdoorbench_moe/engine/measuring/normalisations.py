"""Check whether an imported model was trained with another normalisation, by comparing the usual ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.measuring.evaluate import share
from backdoorbench_moe.models.common import NORMALISATIONS, Colour
from backdoorbench_moe.ops.images import as_input, batch_size_for, draw_images

IMAGES = 500
Normalisation = tuple[Colour, Colour]


def advise(
    model: nn.Module, split: Split, chosen: Normalisation | None, *, seed: int, precision: str
) -> str | None:
    """Compare the accuracy of a model with that under the usual normalisations.

    Args:
        model: The model, in evaluation mode on the device of the images.
        split: Labelled images, of which at most `IMAGES` are used.
        chosen: The normalisation that is part of the model.
        seed: Seed of the draw of images.
        precision: "fp32" or "bf16".

    Returns:
        A sentence for the user if another normalisation is better and the 95% intervals do not overlap; otherwise None.
    """
    keep = draw_images(split.labels.cpu(), min(IMAGES, len(split)), seed).to(split.labels.device)
    images, labels = split.images[keep], split.labels[keep]
    own = NORMALISATIONS["none"] if chosen is None else chosen
    found = {
        name: _measure(model, images, labels, own, each, precision) for name, each in NORMALISATIONS.items()
    }
    given = _measure(model, images, labels, own, own, precision)
    best = max(found, key=lambda name: found[name]["value"])
    if found[best]["low"] <= given["high"]:
        return None
    return (
        f"model.mean: with the mean and standard deviation of {best!r} the accuracy is {found[best]['value']:.1f}%, "
        f"with the given ones {given['value']:.1f}% ({len(labels)} test images); does the model need another "
        "normalisation?"
    )


@torch.inference_mode()
def _measure(
    model: nn.Module, images: Tensor, labels: Tensor, own: Normalisation, other: Normalisation, precision: str
) -> Mapping[str, float]:
    """The accuracy with another normalisation instead of the model's.

    The input is transformed so that, after the model's normalisation, it equals the image under the other one. This
    also holds if the model resizes images, since normalisation commutes with weighted means of pixels.
    """
    mean, std, new_mean, new_std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (*own, *other)
    )
    hits, size = [], batch_size_for(images)
    for batch, wanted in zip(images.split(size), labels.split(size), strict=True):
        values = as_input(batch)
        if other != own:
            values = (values - new_mean) / new_std * std + mean
        with autocast(images.device, precision):
            hits.append(model(values).argmax(1) == wanted)
    return share(torch.cat(hits))
