"""Which channels are pruned, that they stay so, and what is refused."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model
from torch import Tensor, nn

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.fine_pruning import rank_channels
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.structure import ChannelGroup


class ByHand(nn.Module):
    """One pixel, one convolution of four channels with known outputs, and a norm that shifts them.

    For the images 0 and 1 the convolution gives per channel
        a: 1, 3    b: -4, 2    c: 0, 0    d: -1, -1
    and the norm, with mean 0, variance 1 and shifts 0, 3, -1, 2.5,
        a: 1, 3    b: -1, 5    c: -1, -1  d: 1.5, 1.5.
    Signed means before the norm: 2, -1, 0, -1. Means behind norm and ReLU: 2, 2.5, 0, 1.5.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, eps=0)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([2.0, 6.0, 0.0, 0.0]).reshape(4, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([1.0, -4.0, 0.0, -1.0]))
            self.norm.bias.copy_(torch.tensor([0.0, 3.0, -1.0, 2.5]))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """The activations."""
        return self.norm(self.conv(images)).relu()


@pytest.mark.parametrize(
    ("ranking", "scores", "order"),
    [("notebook", [2, -1, 0, -1], [1, 3, 2, 0]), ("post-relu", [2, 2.5, 0, 1.5], [2, 3, 0, 1])],
)
def test_the_two_rankings_by_hand(ranking, scores, order) -> None:
    model = ByHand()
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    groups = [
        ChannelGroup.whole("all", model.conv, model.norm),
        ChannelGroup("half", model.conv, 1, 3, model.norm),
    ]
    whole, half = rank_channels(groups, ranking, run=lambda: model(images))
    assert whole.tolist() == pytest.approx(scores)
    assert whole.sort(stable=True).indices.tolist() == order
    assert half.tolist() == pytest.approx(scores[1:3])


def test_without_a_norm_the_convolution_itself_is_rectified() -> None:
    model = ByHand()
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    [scores] = rank_channels([ChannelGroup.whole("all", model.conv)], "post-relu", run=lambda: model(images))
    assert scores.tolist() == pytest.approx([2, 1, 0, 0])


def pruned_channels(model: nn.Module) -> Tensor:
    return (model.moe.conv.weight == 0).flatten(1).all(1).reshape(4, 5)


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 1), (0.59, 2), (0.99, 4)])
def test_every_expert_loses_its_own_share_and_nothing_else_changes(ratio, count) -> None:
    model = used_model()
    before = copies(model)
    task, reported = make_task(model)
    result = create_defense("fine-pruning", ratio=ratio, epochs=0)(task)
    assert result.stage == "pruned" and not reported
    assert pruned_channels(result.model).sum(1).tolist() == [count] * 4
    names = {"moe.conv.weight", "norm.weight", "norm.bias"}
    # The convolution's bias starts at zero, so that nothing shows there.
    assert changed(before, copies(result.model)) <= {*names, "moe.conv.bias"}
    kept = ~pruned_channels(result.model).flatten()
    assert torch.equal(result.model.moe.conv.weight[kept], before["moe.conv.weight"][kept])


def test_the_channels_pruned_are_those_an_own_forward_pass_finds_least_active() -> None:
    """An independent oracle: activations read off a pass of our own, and sorted by Python."""
    model = used_model()
    task, _ = make_task(model)
    with torch.no_grad():
        images = task.clean.images.float() / 255
        features = model.reduce(model.reduce_norm(model.trunk(images)).relu())
        active = model.norm(model.moe(features)[0]).relu().mean((0, 2, 3)).reshape(4, 5)
    expected = [sorted(sorted(range(5), key=lambda c: row[c].item())[:2]) for row in active]
    create_defense("fine-pruning", ratio=0.4, epochs=0)(task)
    assert [row.nonzero().flatten().tolist() for row in pruned_channels(model)] == expected


def test_post_relu_silences_the_activation_and_notebook_only_the_convolution() -> None:
    for ranking, silent in (("post-relu", True), ("notebook", False)):
        model = used_model()
        with torch.no_grad():
            model.norm.bias.fill_(1.0)  # What a pruned channel would give where only the convolution is.
            model.norm.running_mean.zero_()
        task, _ = make_task(model)
        create_defense("fine-pruning", ratio=0.4, epochs=0, ranking=ranking)(task)
        pruned = pruned_channels(model).flatten()
        activations = []
        hook = model.norm.register_forward_hook(lambda m, i, o, a=activations: a.append(o.relu()))
        task.logits(model, task.clean.images)
        hook.remove()
        assert (activations[0][:, pruned] == (0.0 if silent else 1.0)).all()
        assert (model.norm.weight[pruned] == 0).all() == silent


@pytest.mark.parametrize(
    "recipe", [{}, {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}, {"momentum": 0.9}]
)
def test_pruned_channels_stay_zero_through_the_tuning(recipe) -> None:
    model = used_model()
    task, reported = make_task(model, **recipe)
    result = create_defense("fine-pruning", ratio=0.4, epochs=2)(task)
    [(name, pruned)] = reported
    assert (name, result.stage) == ("pruned", "tuned")
    zero = (pruned["moe.conv.weight"] == 0).flatten(1).all(1)
    assert zero.sum() == 8
    after = copies(result.model)
    for key in ("moe.conv.weight", "moe.conv.bias", "norm.weight", "norm.bias"):
        assert (after[key][zero] == 0).all(), key
    assert (after["moe.conv.weight"][~zero] != pruned["moe.conv.weight"][~zero]).flatten(1).any(1).all()
    assert "trunk.stem.weight" in changed(pruned, after), "all else is tuned"


def test_where_only_the_convolution_is_pruned_it_stays_zero_in_all_experts() -> None:
    """Unlike with "post-relu", the norm passes gradients to the pruned channels."""
    model = used_model()
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
    task, _ = make_task(model)
    result = create_defense("fine-pruning", ratio=0.4, epochs=1, ranking="notebook")(task)
    assert pruned_channels(result.model).sum(1).tolist() == [2] * 4


@pytest.mark.parametrize("scope", ["trunk", "all"])
def test_scopes_of_a_routed_model(scope) -> None:
    model = used_model()
    create_defense("fine-pruning", ratio=0.25, epochs=0, scope=scope)(make_task(model)[0])
    assert (model.reduce.weight == 0).flatten(1).all(1).sum() == 2
    assert pruned_channels(model).sum() == (4 if scope == "all" else 0)


@pytest.mark.parametrize(
    ("name", "conv"),
    [
        ("wide_resnet", "block3.conv2"),
        ("preact_resnet18", "blocks.7.conv2"),
        ("vgg16_bn", "features.40"),
        ("timm:test_resnet", "network.layer4.0.conv2"),
    ],
)
def test_a_dense_model_loses_channels_of_its_last_convolution(name, conv) -> None:
    model = used_model(name)
    task, _ = make_task(model, batch_size=24)
    create_defense("fine-pruning", ratio=0.5, epochs=1)(task)
    weight = model.get_submodule(conv).weight
    assert (weight == 0).flatten(1).all(1).sum() == len(weight) // 2
    with pytest.raises(ConfigError, match=r"scope: expected one of \['trunk', 'all'\] for .*, got 'experts'"):
        create_defense("fine-pruning", scope="experts")(task)


def test_a_transformer_loses_hidden_units_of_its_last_mlp() -> None:
    """Those an own pass finds least active; and what is left of them adds nothing to any token."""
    model = used_model("timm:test_vit")
    task, _ = make_task(model)
    mlp = model.network.blocks[-1].mlp
    seen: list[Tensor] = []
    hook = mlp.fc1.register_forward_hook(lambda m, _, output: seen.append(output))
    task.logits(model, task.clean.images)
    hook.remove()
    active = torch.cat(seen).relu().mean((0, 1))
    expected = sorted(sorted(range(len(active)), key=lambda unit: active[unit].item())[: len(active) // 4])
    create_defense("fine-pruning", ratio=0.25, epochs=1)(task)
    pruned = (mlp.fc1.weight == 0).all(1)
    assert pruned.nonzero().flatten().tolist() == expected and not mlp.fc1.bias[pruned].any()
    assert (mlp.fc2.weight[:, pruned] != 0).any()


class Unprunable(nn.Module):
    """A model of which nothing can be pruned."""

    def components(self) -> dict[str, list[nn.Module]]:
        """None."""
        return {}

    prunable = components


class Nameless(nn.Module):
    """A model that does not say what it is made of."""


def test_a_model_without_names_or_channels_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="the model Nameless does not name its components"):
        create_defense("fine-pruning").check(Nameless())
    with pytest.raises(ConfigError, match="Unprunable has no channels that can be pruned"):
        create_defense("fine-pruning").check(Unprunable())
    with pytest.raises(ConfigError, match=r"ratio: 0\.1 prunes none of the 5 channels of expert 0"):
        create_defense("fine-pruning", ratio=0.1).check(used_model())
    create_defense("fine-pruning", ratio=0).check(used_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio: expected a number in \[0, 1\), got 1\.0"),
        ({"ratio": -0.1}, "ratio: expected"),
        ({"ratio": float("nan")}, "ratio: expected"),
        ({"epochs": -1}, "epochs: expected an integer of at least 0, got -1"),
        ({"lr": 0}, "lr: expected a positive number, got 0"),
        ({"clean_fraction": 0}, r"clean_fraction: expected a number in \(0, 1\], got 0"),
        ({"clean_fraction": 1.1}, "clean_fraction: expected"),
        ({"ratio": "x"}, "ratio: expected a number, got 'x'"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("fine-pruning", **options)


def test_near_names_are_suggested() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'post-relu'"):
        create_defense("fine-pruning", ranking="post_relu")
    with pytest.raises(UnknownNameError, match="did you mean 'fine-pruning'"):
        create_defense("fine_pruning")
