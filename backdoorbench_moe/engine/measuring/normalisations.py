"""Whether an imported model was trained with another normalisation: the usual ones are compared on some images."""

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
    """Compare the accuracy with the usual normalisations.

    Args:
        model: The model, in evaluation mode on the device of the images.
        split: Labelled images, of which at most `IMAGES` are used.
        chosen: The normalisation that the model has inside.
        seed: Seed of the draw of images.
        precision: "fp32" or "bf16".

    Returns:
        A sentence if another normalisation is better by more than chance, that is, if the 95% intervals do not overlap;
        None otherwise.
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
        f"model.mean: with the mean and standard deviation of {best!r} the accuracy is {found[best]['value']:.1f}%, as "
        f"given {given['value']:.1f}% ({len(labels)} test images); is it another normalisation that the model needs?"
    )


@torch.inference_mode()
def _measure(
    model: nn.Module, images: Tensor, labels: Tensor, own: Normalisation, other: Normalisation, precision: str
) -> Mapping[str, float]:
    """The accuracy with another normalisation in place of the model's own.

    The model gets values that its own normalisation maps to what the other one would give. Resizing makes weighted
    means of pixels, so it gives the same before and after.
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
