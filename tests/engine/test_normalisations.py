"""Whether another normalisation suits a model better than its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe.engine.measuring.normalisations import advise
from backdoorbench_moe.ops.images import Split


class Bright(nn.Module):
    """Predicts class 1 if the mean of the input is above `bound`, and class 0 otherwise."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2) logits."""
        bright = (images.mean((1, 2, 3)) > self.bound).float()
        return torch.stack([1 - bright, bright], dim=1)


@pytest.mark.parametrize(("count", "warned"), [(6, False), (200, True)])
def test_a_difference_that_few_images_may_show_by_chance_is_not_told(count, warned) -> None:
    """Half of the images are dark (0.4) and half bright (0.6), which is below and above the mean of ImageNet.

    The model divides at 0, so its accuracy is 50% without a normalisation and 100% with that of ImageNet.
    """
    labels = torch.arange(count) % 2
    images = (102 + 51 * labels).byte().view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    found = advise(Bright(0.0), Split(images, labels), None, seed=0, precision="fp32")
    assert (found is not None) == warned
    if warned:
        assert "100.0%, with the given ones 50.0% (200 test images)" in found
