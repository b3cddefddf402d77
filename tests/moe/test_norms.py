"""Measured statistics against a pass in training mode and against moments of all values at once."""

from __future__ import annotations

import torch
from torch import nn

from backdoorbench_moe.moe.norms import batch_norms, input_moments, measure_statistics


def two_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(64)
    ).eval()


def test_whole_norms_get_the_statistics_of_all_values_in_order() -> None:
    model, images = two_norms(), 1000 + torch.randn(10, 3, 6, 6)
    everything = {name: (0, len(t)) for name, t in model.state_dict().items() if t.ndim}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    measure_statistics(model, everything, lambda: [model(part) for part in images.split([3, 3, 3, 1])])
    passed = images
    for layer in model:
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            values = passed.detach().double().transpose(0, 1).flatten(1)
            torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.running_var.double(), values.var(1), rtol=1e-4, atol=1e-6)
        passed = layer(passed)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_agrees_with_a_norm_in_training_of_momentum_one() -> None:
    norm, twin, images = nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3, momentum=1.0), torch.randn(5, 3, 4, 4)
    measure_statistics(
        nn.Sequential(norm), {"0.running_mean": (0, 3), "0.running_var": (0, 3)}, lambda: norm(images)
    )
    twin(images)
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)


def test_other_rows_stay_bit_for_bit() -> None:
    model, images = two_norms(), torch.randn(8, 3, 6, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    measure_statistics(
        model, {"3.running_mean": (1, 3), "3.weight": (0, 4), "1.bias": (0, 4)}, lambda: model(images)
    )
    after = model.state_dict()
    assert {name for name, t in before.items() if not torch.equal(t, after[name])} == {"3.running_mean"}
    moved = after["3.running_mean"] != before["3.running_mean"]
    assert moved.tolist() == [False, True, True, False]


def test_only_norms_with_a_scale_and_statistics_are_listed() -> None:
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)]
    assert batch_norms(nn.Sequential(*norms, nn.LayerNorm(3))) == {"0": norms[0]}


def test_a_batch_without_values_does_not_count() -> None:
    """An expert may receive no token of a batch, first or later."""
    norm, values = nn.BatchNorm1d(3).eval(), torch.randn(5, 3)
    parts = [values[:0], values[:2], values[:0], values[2:]]
    mean, variance, count = input_moments([norm], lambda: [norm(part) for part in parts])[norm]
    assert count == 5
    torch.testing.assert_close(mean, values.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, values.double().var(0), rtol=1e-5, atol=1e-6)
    assert input_moments([norm], lambda: norm(values[:0])) == {}
