"""Checks of image tensors from callers and plug-ins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.ops.checks import unwritten
from backdoorbench_moe.triggers.base import Trigger


class Brightens(Trigger):
    """Writes into its input in every form."""

    def stamp(self, images: Tensor) -> Tensor:
        return images.clamp_(min=0.5)

    def stamp_noise(self, images: Tensor, places: Tensor) -> Tensor:
        images[:, :, 0, 0] = 1  # A view, whose writes count, too.
        return images.clone()


class Corner(Applicator):
    def apply(self, images: Tensor, trigger: object) -> Tensor:
        images[..., -1, -1] = 0
        return images.clone()


@pytest.mark.parametrize(
    "call",
    [
        lambda images: Brightens()(images),
        lambda images: Brightens().training(images, torch.arange(2)),
        lambda images: Brightens().noise(images, torch.arange(2)),
        lambda images: Corner()(images, Brightens()),
    ],
    ids=["stamp", "training", "noise", "applicator"],
)
def test_a_part_that_writes_into_its_input_is_named(call) -> None:
    with pytest.raises(
        PluginError, match=r"(trigger Brightens|applicator Corner): writes into its input; expected"
    ):
        call(torch.rand(2, 3, 8, 8))


def test_images_of_inference_mode_are_not_watched() -> None:
    with torch.inference_mode():
        images = torch.zeros(1, 3, 2, 2)
        with unwritten(images, "trigger"):
            images += 1
    assert images.min() == 1
