"""Patch sums and routing: against values computed by hand, and against scipy."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import mannwhitneyu

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.analysis.pixels import BINS, image_differences, layer_pixels

# Two images of four patches of 2x2 pixels (sums in [0, 4]); expert 0 takes the bright half, expert 1 all.
SUMS = torch.tensor([[0.0, 1, 3, 4], [0.5, 3, 1, 4]], dtype=torch.float64)
SELECTED = torch.tensor(
    [[[False, False, True, True], [True] * 4], [[False, True, False, True], [True] * 4]]
)  # fmt: skip


def layer(selected: torch.Tensor) -> LayerPass:
    return LayerPass("moe", "patches", selected, torch.empty(0), torch.empty(0))


def test_by_hand() -> None:
    found = layer_pixels(layer(SELECTED), SUMS, torch.tensor([0, 2]), 3, 2)
    bright, everything = found.overall
    assert bright is not None and everything is None
    assert (bright.n, bright.auc, bright.rank_biserial) == ((4, 4), 1, 1)
    assert bright.means == (3.5, 0.625)
    # Image 0: (3 + 4)/2 - (0 + 1)/2 = 3; image 1: (3 + 4)/2 - (0.5 + 1)/2 = 2.75.
    assert image_differences(SELECTED, SUMS)[:, 0].tolist() == [3, 2.75]
    assert (found.by_image[0].value, found.by_image[0].n) == (2.875, 2)
    assert found.by_image[1].value is None and found.by_image_share[0] == 1
    assert found.by_class[1] == (None, None)
    assert [c[0].n for c in (found.by_class[0], found.by_class[2])] == [(2, 2), (2, 2)]  # type: ignore[union-attr]
    # Bins of 4/32: value v lies in bin 8 v, the largest in the last one.
    assert found.edges[0] == 0 and found.edges[-1] == 4 and len(found.edges) == BINS + 1
    assert found.taken[0].nonzero().flatten().tolist() == [24, 31] and found.taken[0, 24] == 2
    assert found.not_taken[0].nonzero().flatten().tolist() == [0, 4, 8] and not found.not_taken[1].any()


def test_the_test_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    selected = torch.rand(30, 2, 16, generator=generator) < 0.25
    sums = torch.randint(0, 40, (30, 16), generator=generator).double() / 10
    labels = torch.arange(30) % 3
    found = layer_pixels(layer(selected), sums, labels, 3, 2)
    for keep, differences in [
        (labels >= 0, found.overall),
        *((labels == c, found.by_class[c]) for c in range(3)),
    ]:
        for e, difference in enumerate(differences):
            inside, outside = sums[keep][selected[keep][:, e]], sums[keep][~selected[keep][:, e]]
            test = mannwhitneyu(inside.numpy(), outside.numpy(), method="asymptotic")
            assert difference is not None
            assert difference.p == pytest.approx(test.pvalue)
            assert difference.auc == pytest.approx(test.statistic / (len(inside) * len(outside)))


def test_an_expert_that_takes_all_patches_has_no_difference_whatever_the_rounding() -> None:
    # Sums in steps of 1/765, as those of 8-bit images, whose two sums over all patches differ by rounding.
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(0, 765 * 16, (200, 64), generator=generator).double() / 765
    selected = torch.stack([torch.ones(200, 64), torch.zeros(200, 64)], 1).bool()
    assert image_differences(selected, sums).isnan().all()
    found = layer_pixels(layer(selected), sums, torch.zeros(200, dtype=torch.int64), 1, 4)
    assert [(mean.value, mean.n) for mean in found.by_image] == [(None, 0), (None, 0)]
