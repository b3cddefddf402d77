"""Checks of weights: planted experts, channels and classes are named, identical siblings are not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import EXPERTS, Rows, images, look, merged, small_pmoe
from torch import nn

from backdoorbench_moe.auditing.check import NotTested
from backdoorbench_moe.auditing.checks.weights import distances, largest_singular, stable_rank
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.experts import copy_expert
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import settle

SIBLING_CHECKS = ("gate-rows", "expert-norms", "expert-spectra")


def alike(model: nn.Module) -> nn.Module:
    """The model with all experts and gates as the first one."""
    state, (first, *others) = model.state_dict(), model.experts()
    for expert in others:
        for name, (start, stop) in expert.own.items():
            low, high = first.own[name]
            state[name][start:stop].copy_(state[name][low:high].clone())
    router = model.moe.router.weight
    with torch.no_grad():
        router.copy_(router[:1].clone().expand_as(router))
    return model


def test_a_gate_row_ten_times_as_long_is_flagged() -> None:
    model = small_pmoe()
    assert look(model, "gate-rows").score < 2
    with torch.no_grad():
        model.moe.router.weight[3] *= 10
    found = look(model, "gate-rows")
    assert found.score > 2 and found.details["expert"] == "moe/3"
    lengths = model.moe.router.weight.detach().double().norm(dim=1)
    others = torch.cat([lengths[:3], lengths[4:]]).log().mean().exp()
    assert found.details["ratio"] == pytest.approx((lengths[3] / others).item())
    assert "moe/3" in found.reason and f"{found.details['ratio']:.3g} times" in found.reason


def test_an_expert_with_larger_weights_and_one_with_another_spectrum_are_flagged() -> None:
    model = small_pmoe(24)
    start, stop = model.experts()[2].own["moe.conv.weight"]
    rows = model.state_dict()["moe.conv.weight"][start:stop]
    for name in ("expert-norms", "expert-spectra"):
        assert look(model, name).score < 2
    rows.mul_(3)
    assert look(model, "expert-norms").details["expert"] == "moe/2" and look(model, "expert-norms").score > 2
    rows.div_(3)
    # All of a matrix in one direction, with the norm that it had.
    norm = rows.norm()
    rows.copy_(rows[:1].clone().expand_as(rows))
    rows.mul_(norm / rows.norm())
    found = look(model, "expert-spectra")
    assert found.details["expert"] == "moe/2" and found.score > 2
    assert look(model, "expert-norms").score < 2


def test_identical_siblings_are_not_flagged() -> None:
    model = alike(small_pmoe())
    for name in SIBLING_CHECKS:
        found = look(model, name)
        assert found.score == 0 and "no expert stands out" in found.reason


@given(order=st.permutations(range(EXPERTS)))
@settings(max_examples=6, deadline=None)
def test_permuted_experts_give_permuted_findings(order) -> None:
    model = small_pmoe()
    with torch.no_grad():
        model.moe.router.weight[1] *= 4
    moved, experts = copy.deepcopy(model), model.experts()
    with torch.no_grad():
        moved.moe.router.weight.copy_(model.moe.router.weight[list(order)])
        for place, source in enumerate(order):
            for name, (start, stop) in experts[place].own.items():
                low, high = experts[source].own[name]
                moved.state_dict()[name][start:stop].copy_(model.state_dict()[name][low:high])
    for name in SIBLING_CHECKS:
        before, after = look(model, name), look(moved, name)
        assert after.score == pytest.approx(before.score, rel=1e-5, abs=1e-6)
        for place, source in enumerate(order):
            assert after.details["experts"][f"moe/{place}"] == pytest.approx(
                before.details["experts"][f"moe/{source}"], rel=1e-5, abs=1e-6
            )


def test_a_factor_of_the_whole_router_does_not_matter() -> None:
    model = small_pmoe()
    before = look(model, "gate-rows")
    with torch.no_grad():
        model.moe.router.weight *= 0.01
    assert look(model, "gate-rows").score == pytest.approx(before.score, rel=1e-5)


def test_an_expert_far_from_the_base_is_flagged() -> None:
    mixture, base = merged()
    given = {"base": base.state_dict()}
    assert look(mixture, "expert-distance", **given).score < 2
    for expert in mixture.experts():
        if expert.index == 4:
            for name, (start, stop) in expert.own.items():
                rows = mixture.state_dict()[name][start:stop]
                rows.add_(0.2 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    found = look(mixture, "expert-distance", **given)
    assert found.score > 2 and found.details["expert"].endswith("/4")
    # Another mixture of the same architecture is a base, too: nothing but expert 4 was changed since.
    before, _ = merged()
    assert look(mixture, "expert-distance", base=before.state_dict()).details["expert"].endswith("/4")


def test_spectra_by_hand() -> None:
    """The singular values 3 and 4: the stable rank is (9 + 16) / 16."""
    matrix = torch.tensor([[0.0, 3.0], [4.0, 0.0]], dtype=torch.float64)
    assert largest_singular(matrix) == pytest.approx(4) and stable_rank(matrix) == pytest.approx(25 / 16)
    assert stable_rank(torch.zeros(2, 2)) == 0


def test_distances_are_relative_to_the_base() -> None:
    """An expert whose base is three times as large is 2/3 of it away; one whose base is 0, by its own norm."""
    mixture, _ = merged()
    base = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    for expert in mixture.experts():
        for name, (start, stop) in expert.own.items():
            base[name][start:stop] *= {1: 3, 2: 0}.get(expert.index, 1)
    for place, by_expert in distances(mixture, base).items():
        assert "weight matrix" in place
        found = {int(name.rpartition("/")[2]): value for name, value in by_expert.items()}
        assert found[1] == pytest.approx(2 / 3) and found[0] == found[3] == 0
        assert found[2] > 0 and found[2] != pytest.approx(1)


def test_a_base_of_another_architecture_is_said() -> None:
    mixture, _ = merged()
    with pytest.raises(NotTested, match="another architecture"):
        look(mixture, "expert-distance", base=small_pmoe().state_dict())
    with pytest.raises(NotTested, match="no base was given"):
        look(mixture, "expert-distance")
    with pytest.raises(NotTested, match="has no experts"):
        look(Rows(), "expert-norms")
    with pytest.raises(NotTested, match="at least 3 experts"):
        look(small_pmoe(2), "expert-norms")


def test_a_planted_channel_is_named() -> None:
    model = small_pmoe()
    before = look(model, "channel-norms", image_size=32)
    with torch.no_grad():
        model.trunk.block1.conv2.weight[5] *= 500
    found = look(model, "channel-norms", image_size=32)
    assert found.details["channel"] == 5 and "channel 5 of trunk.block2.norm1" in found.reason
    # Of n channels, none can be further above the mean than (n - 1) / sqrt(n).
    count = len(model.trunk.block2.norm1.weight)
    assert found.score == pytest.approx((count - 1) / count**0.5, rel=1e-3) and found.score > before.score
    with pytest.raises(NotTested, match="size of the images"):
        look(Rows(), "channel-norms")
    with pytest.raises(NotTested, match="no channels"):
        look(Rows(), "channel-norms", image_size=8)


def test_a_planted_channel_of_an_expert_has_its_number_in_the_layer() -> None:
    with seeded(0, "init"):
        model = settle(
            create_model("pmoe", num_classes=3, widen_factor=1, moe_channels=8, expert_channels=24)
        )
    with torch.no_grad():
        model.moe.conv.weight[2 * 24 + 7] *= 500
    found = look(model, "channel-norms", image_size=32)
    assert found.details["channel"] == 55 and "channel 55 of norm of moe/2 can amplify" in found.reason


def test_a_class_with_larger_weights_is_named_and_smaller_ones_are_not() -> None:
    draws = torch.Generator().manual_seed(1)
    model = Rows()
    with torch.no_grad():
        model.layer.weight.normal_(generator=draws)
    assert look(model, "head-rows").score < 2
    with torch.no_grad():
        model.layer.weight[2] += 0.8
    found = look(model, "head-rows")
    assert found.score > 2 and found.details["class"] == "2"
    with torch.no_grad():
        model.layer.weight += 5  # All logits by the same amount: no prediction changes.
    assert look(model, "head-rows").score == pytest.approx(found.score, rel=1e-3)
    with torch.no_grad():
        model.layer.weight[2] -= 1.6
    assert look(model, "head-rows").score == 0


def test_checks_leave_the_model_as_it_is() -> None:
    model = small_pmoe()
    model.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split = images()
    for name in (
        *SIBLING_CHECKS,
        "head-rows",
        "channel-norms",
        "scaled-images",
        "scaled-norms",
        "class-routing",
    ):
        try:
            look(model, name, images=split.images, labels=split.labels)
        except NotTested:
            continue
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training and not model.head.weight.requires_grad and model.reduce.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_copies_of_an_expert_are_siblings_like_others() -> None:
    model = small_pmoe()
    other = small_pmoe(seed=1)
    copy_expert(other, model, model.experts()[0])
    assert look(model, "expert-norms").score < 2
