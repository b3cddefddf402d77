"""Divergences by hand, planted statistics, experts, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from defense_tasks import changed, copies, held_images, make_task, used_model
from torch import nn
from torch.distributions import Normal, kl_divergence

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.bnp import normal_divergence
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.norms import input_moments, measure_statistics


def test_divergence_by_hand() -> None:
    """Mean 1, variance 4 from the standard normal: (ln(1/4) + 4 + 1 - 1) / 2; equal ones by 0."""
    ones = torch.ones(2)
    found = normal_divergence(torch.tensor([1.0, 0]), torch.tensor([4.0, 1]), 0 * ones, ones)
    assert found.tolist() == pytest.approx([(math.log(1 / 4) + 4) / 2, 0.0])
    assert normal_divergence(0 * ones, 0 * ones, 0 * ones, ones).isfinite().all()
    assert normal_divergence(0 * ones, 0 * ones, 0 * ones, 0 * ones).tolist() == [0.0, 0.0]


def test_divergence_agrees_with_torchs() -> None:
    draws = torch.Generator().manual_seed(1)
    mean, stored = (torch.randn(50, generator=draws).double() for _ in range(2))
    variance, other = (torch.rand(50, generator=draws).double() + 0.1 for _ in range(2))
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(stored, other.sqrt()))
    torch.testing.assert_close(normal_divergence(mean, variance, stored, other), expected)


def test_moments_of_several_norms_at_once() -> None:
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    images = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 2
    found = input_moments([first, second], lambda: [model(batch) for batch in images.split(4)])
    for norm, values in ((first, images), (second, model[:2](images))):
        mean, variance, count = found[norm]
        flat = values.transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(mean, flat.mean(1))
        torch.testing.assert_close(variance, flat.var(1))
        assert count == 160


def at_rest(name: str = "pmoe") -> nn.Module:
    """A model whose stored statistics are those of the defender's images."""
    model = used_model(name)
    task, _ = make_task(model, name=name)
    rows = {key: (0, len(t)) for key, t in model.state_dict().items() if "running" in key}
    measure_statistics(model, rows, lambda: task.logits(model, task.clean.images))
    return model


def bnp(model: nn.Module, name: str = "pmoe", **options: object):
    return create_defense("bnp", **options)(make_task(model, name=name)[0])


@pytest.mark.parametrize(
    ("name", "norm"), [("wide_resnet", "block3.norm2"), ("vgg16_bn", "features.35"), ("pmoe", "reduce_norm")]
)
@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_a_planted_statistic_is_found_and_only_the_scale_is_pruned(name, norm, statistic) -> None:
    model = at_rest(name)
    module = model.get_submodule(norm)
    with torch.no_grad():
        getattr(module, statistic)[3] += 50 * module.running_var.max().sqrt()
    before = copies(model)
    result = bnp(model, name)
    assert norm in result.judgements[0].suspicious
    assert result.judgements[0].details["pruned"][norm] == [3]
    assert changed(before, copies(model)) <= {
        f"{layer}.weight" for layer in result.judgements[0].details["pruned"]
    }
    assert module.weight[3] == 0 and (module.weight != 0).sum() == len(module.weight) - 1


def test_scores_are_the_divergences_from_what_the_norm_receives() -> None:
    model = used_model("wide_resnet")
    task, _ = make_task(model, name="wide_resnet")
    seen: list[torch.Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    task.logits(model, task.clean.images)
    hook.remove()
    values = torch.cat(seen).double().transpose(0, 1).flatten(1)
    stored = Normal(model.norm.running_mean.double(), model.norm.running_var.double().sqrt())
    scores = kl_divergence(Normal(values.mean(1), values.std(1)), stored)
    found = bnp(model, "wide_resnet").judgements[0]
    assert found.scores["norm"] == pytest.approx(
        ((scores.max() - scores.mean()) / scores.std()).item(), rel=1e-4
    )
    assert found.details["values"]["norm"] == values.shape[1] and found.details["images"] == 24


def test_channels_are_compared_within_their_expert() -> None:
    """All channels of expert 3 are off by far; channel 17 of expert 2 is off among its own."""

    def planted() -> nn.Module:
        model = at_rest()
        with torch.no_grad():
            mean, deviation = model.moe.norm.running_mean, model.moe.norm.running_var.sqrt()
            mean[24:] += 1000 * deviation[24:]
            mean[17] += 10 * deviation[17]
        return model

    found = bnp(
        planted(), u=2.4
    )  # Of eight channels, one cannot be further than 2.47 deviations from the mean.
    assert found.judgements[0].details["pruned"]["moe.norm"] == [17]
    assert found.judgements[1].about == "expert" and "moe/2" in found.judgements[1].suspicious
    for name, score in found.judgements[1].scores.items():
        own = [found.judgements[0].scores[f"{norm} of {name}"] for norm in ("moe.norm", "norm")]
        assert score == max(own) > min(own), "the highest of both norms that an expert has channels in"
    alike = bnp(planted(), u=2.0, experts=False)
    assert 17 not in alike.judgements[0].details["pruned"].get("moe.norm", []) and len(alike.judgements) == 1


def test_the_number_of_patches_of_each_expert_is_stated() -> None:
    model = used_model()
    clean = held_images(20)
    with torch.no_grad():
        [routing] = model.forward_routed(clean.images.float() / 255).routing
    found = create_defense("bnp", u=1.0)(make_task(model, clean=clean)[0]).judgements[1]
    counts = routing.selected.sum((0, 2)).tolist()
    assert found.details["patches"] == {f"moe/{e}": counts[e] for e in range(4)}


def test_norms_that_are_not_called_are_left_out() -> None:
    """An auxiliary head that works in training only."""
    model = used_model("wide_resnet")
    model.auxiliary = nn.BatchNorm2d(20)
    found = bnp(model, "wide_resnet").judgements[0]
    assert "norm" in found.scores and "auxiliary" not in found.scores
    with pytest.raises(ValueError, match="expected the run to call auxiliary"):
        measure_statistics(
            model, {"auxiliary.running_mean": (0, 20)}, lambda: model(torch.zeros(2, 3, 32, 32))
        )


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: ConvNeXt has no batch norms with running statistics"):
        create_defense("bnp").check(used_model("convnext"))
    with pytest.raises(ConfigError, match="model: expected a routed model, WideResNet has no routing"):
        create_defense("bnp", experts=True).check(used_model("wide_resnet"))
    with pytest.raises(ConfigError, match=r"u: expected below 7\.88"):
        create_defense("bnp", u=9).check(used_model("wide_resnet"))
    with pytest.raises(ConfigError, match="u: expected a positive number, got -1"):
        create_defense("bnp", u=-1)
