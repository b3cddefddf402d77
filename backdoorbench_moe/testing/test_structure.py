"""Conformance tests for models that describe their parts: experts, components, prunable channels, features."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.moe.experts import copy_expert, expert_outputs, muted, replaced_output
from backdoorbench_moe.moe.pruning import channel_means, silence
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import (
    ChannelGroup,
    Expert,
    MasksExperts,
    Structured,
    WithExperts,
    WithFeatures,
    channels_of,
)
from backdoorbench_moe.testing.making import batch, changed, copies, used_model

# Value that replaces the output of an expert, far from what any expert computes.
REPLACED = 3.0
# Numbers of coloured squares along a side of the other images that are tried, and how often each is drawn.
SQUARES, DRAWS = (4, 1, 32, 8, 2, 16), 3


def images() -> Tensor:
    return batch(4, 3, 32, 32)


def image_draws() -> Iterator[Tensor]:
    """Yield `images()`, then batches of images that differ more from each other: random squares of all contrasts.

    Uniform noise is alike everywhere, so that a router may send all patches of it to the same few experts.
    """
    yield images()
    for seed, squares in itertools.product(range(DRAWS), SQUARES):
        generator = torch.Generator().manual_seed(seed)
        colours = torch.rand(16, 3, squares, squares, generator=generator)
        contrast, brightness = torch.rand(2, 16, 1, 1, 1, generator=generator)
        yield F.interpolate(brightness + contrast * (colours - brightness), size=(32, 32))


def draws_that_reach(model: RoutedModel, expert: Expert) -> Iterator[Tensor]:
    """Yield the batches of `image_draws` of which the expert processes a patch. Fail if there are none."""
    reached = False
    for given in image_draws():
        selected = {routing.layer: routing.selected for routing in model.forward_routed(given).routing}
        if selected[expert.layer][:, expert.index].any():
            reached = True
            yield given
    if not reached:
        pytest.fail(
            f"no patch of the test images was sent to expert {expert.name}, so that its effect cannot be tested; "
            "initialise the router so that random images reach every expert, or set fewer experts in the class "
            "attribute `tiny`"
        )


def structured(name: str) -> Structured:
    model = used_model(name)
    assert isinstance(model, Structured) and isinstance(model, nn.Module)
    return model


def with_experts(name: str, *, seed: int = 0) -> RoutedModel:
    model = used_model(name, seed=seed)
    assert isinstance(model, RoutedModel) and isinstance(model, WithExperts)
    return model


def logits_if_replaced(model: nn.Module, expert: Expert, given: Tensor) -> Tensor:
    """Return the logits of given images if all values of the expert's output are `REPLACED`."""
    [output] = expert_outputs([expert], lambda: model(given))
    with replaced_output(expert, torch.full_like(output, REPLACED)):
        return model(given)


def replacing_changes_logits(model: nn.Module, expert: Expert, given: Tensor) -> bool:
    """Return whether the logits of given images change if the expert's output is replaced."""
    return not torch.allclose(logits_if_replaced(model, expert, given), model(given))


@pytest.mark.only(interface=Structured)
def test_the_parts_are_the_models_own_and_do_not_overlap(model_name: str) -> None:
    """The components are modules of the model, and no parameter belongs to two. Routed models have all three."""
    model = structured(model_name)
    own, components = set(model.modules()), model.components()
    assert components.keys() <= {"experts", "router", "head"} and "head" in components
    if isinstance(model, RoutedModel):
        assert len(components) == 3
    seen: set[int] = set()
    for modules in components.values():
        assert modules and set(modules) <= own
        weights = {id(p) for module in modules for p in module.parameters()}
        assert weights and not weights & seen
        seen |= weights


@pytest.mark.only(interface=Structured)
@torch.no_grad()
def test_the_head_decides_the_logits_last(model_name: str) -> None:
    """The images have different logits, but equal ones if the weights of the head are set to zero."""
    model = structured(model_name)
    assert not torch.equal(*model(images()).split(2))
    for module in model.components()["head"]:
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
    logits = model(images())
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


@pytest.mark.only(interface=Structured)
def test_what_can_be_pruned_lies_in_the_model(model_name: str) -> None:
    """Layers, norms and taps are modules of the model; ranges of channels are valid and do not overlap."""
    model = structured(model_name)
    own, prunable = set(model.modules()), model.prunable()
    assert prunable.keys() <= {"experts", "trunk"}
    taken = set()
    for groups in prunable.values():
        for group in groups:
            count = channels_of(group.layer)
            assert group.layer in own and 0 <= group.start < group.stop <= count
            if group.norm is not None:
                assert group.norm in own and group.norm.num_features == count
            if group.tap is not None:
                assert group.tap in own
            channels = {(id(group.layer), channel) for channel in range(group.start, group.stop)}
            assert len(channels) == len(group) and not channels & taken
            taken |= channels


@pytest.mark.only(interface=Structured)
@torch.no_grad()
def test_channels_that_can_be_pruned_can_be_measured_and_have_an_effect(model_name: str) -> None:
    """Channels with weights of zero are zero in the tap's output. Pruning all of a scope changes the logits."""
    for scope, groups in structured(model_name).prunable().items():
        model = structured(model_name)
        for parameter in model.parameters():
            if (
                parameter.ndim == 1
            ):  # An initial scale of zero in a norm would hide the effect of earlier layers.
                parameter.add_(0.1 * torch.rand(len(parameter), generator=torch.Generator().manual_seed(1)))
        before = model(images())
        for group in model.prunable()[scope]:
            assert len(measured(model, group)) == channels_of(group.layer)
            silence(group.layer, torch.arange(group.start, group.stop))
            assert not measured(model, group)[group.start : group.stop].any(), group.name
        assert groups and not torch.equal(model(images()), before), scope


def measured(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return the mean absolute value of every channel of the group's layer: |x| = 2 max(x, 0) - x."""
    tap = group.tap or group.layer
    both = [channel_means([tap], lambda: model(images()), rectify=rectify)[tap] for rectify in (True, False)]
    return 2 * both[0] - both[1]


@pytest.mark.only(interface=WithExperts)
def test_experts_are_those_of_the_gates_and_do_not_overlap(model_name: str) -> None:
    """There is one expert for each gate of each routed layer, in this order, and no row belongs to two experts."""
    model = with_experts(model_name)
    experts, state = model.experts(), model.state_dict()
    expected = [
        (routing.layer, e)
        for routing in model.forward_routed(images()).routing
        for e in range(routing.gates.shape[1])
    ]
    assert [(expert.layer, expert.index) for expert in experts] == expected
    taken: set[tuple[str, int]] = set()
    for expert in experts:
        assert expert.output.items() <= expert.own.items() and expert.output
        assert expert.tap in set(model.modules())
        for key, (start, stop) in expert.own.items():
            assert 0 <= start < stop <= len(state[key])
            rows = {(key, row) for row in range(start, stop)}
            assert not rows & taken
            taken |= rows


@pytest.mark.only(interface=WithExperts)
def test_the_experts_weights_are_those_of_the_component(model_name: str) -> None:
    """Together the experts own all rows of the parameters in the component "experts", and none in the others."""
    model = with_experts(model_name)
    if not isinstance(model, Structured):
        pytest.skip("does not name its components")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows: dict[str, int] = {}
    for expert in model.experts():
        for key, (start, stop) in expert.own.items():
            rows[key] = rows.get(key, 0) + stop - start
    state = model.state_dict()
    for component, modules in model.components().items():
        for name in (names[id(p)] for module in modules for p in module.parameters()):
            assert rows.get(name, 0) == (len(state[name]) if component == "experts" else 0), name


@pytest.mark.only(interface=WithExperts)
@torch.no_grad()
def test_a_muted_expert_has_no_effect_and_any_other_has(model_name: str) -> None:
    """Replacing the output of an expert changes the logits if and only if the expert is not muted."""
    model = with_experts(model_name)
    for expert in model.experts():
        with muted(model, [expert]):
            replaced = logits_if_replaced(model, expert, images())
            torch.testing.assert_close(replaced, model(images()), rtol=0, atol=0)
        assert any(
            replacing_changes_logits(model, expert, given) for given in draws_that_reach(model, expert)
        ), f"{expert.name} processes patches, but replacing the output of its tap does not change the logits"


@pytest.mark.only(interface=WithExperts)
@torch.no_grad()
def test_replacing_an_experts_output_by_itself_changes_nothing(model_name: str) -> None:
    model = with_experts(model_name)
    plain, experts = model(images()), model.experts()
    given = expert_outputs(experts, lambda: model(images()))
    for expert, values in zip(experts, given, strict=True):
        with replaced_output(expert, values):
            torch.testing.assert_close(model(images()), plain, msg=expert.name)
    assert torch.equal(model(images()), plain)


@pytest.mark.only(interface=WithExperts)
@torch.no_grad()
def test_an_expert_is_its_own_weights(model_name: str) -> None:
    """Weights from another model change the outputs of the expert, but not those of the other experts in its layer."""
    model, other = with_experts(model_name), used_model(model_name, seed=1)
    # Only experts of the first routed layer are tested, since these change the inputs of later layers.
    places = [place for place, one in enumerate(model.experts()) if one.layer == model.experts()[0].layer]
    before = expert_outputs(model.experts(), lambda: model(images()))
    used = [place for place in places if before[place].any()]
    assert used, "the outputs of all experts of the first routed layer are zero for the test images"
    for place in used:
        mixed = copy.deepcopy(model)
        copy_expert(other, mixed, model.experts()[place])
        after = expert_outputs(mixed.experts(), lambda model=mixed: model(images()))
        same = [torch.allclose(after[number], before[number]) for number in places]
        assert same == [number != place for number in places], model.experts()[place].name


@pytest.mark.only(interface=WithExperts)
@torch.no_grad()
def test_copying_every_expert_copies_what_they_own_and_nothing_else(model_name: str) -> None:
    """Tensors of which experts own rows then equal those of the other model; all other tensors are unchanged."""
    model, other = with_experts(model_name), used_model(model_name, seed=1)
    mixed = copy.deepcopy(model)
    for expert in model.experts():
        copy_expert(other, mixed, expert)
    own = {key for expert in model.experts() for key in expert.own}
    for key, tensor in mixed.state_dict().items():
        torch.testing.assert_close(tensor, (other if key in own else model).state_dict()[key], msg=key)


@pytest.mark.only(interface=MasksExperts)
@torch.no_grad()
def test_a_masked_expert_has_no_effect_also_after_loading(model_name: str) -> None:
    """A masked expert's weights have no effect on the logits, and a model that loads the state has the same logits."""
    other = used_model(model_name, seed=1)
    for number in range(len(with_experts(model_name).experts())):
        model = with_experts(model_name)
        assert isinstance(model, MasksExperts)
        expert, before = model.experts()[number], copies(model)
        model.mask_expert(expert)
        after, masked = copies(model), model(images())
        assert changed(before, after), "the mask is not part of the state"
        assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
            k: (v.shape, v.dtype) for k, v in before.items()
        }
        # The rows in `output` are not changed, because a model may mask an expert by setting them to zero.
        rest = {key: rows for key, rows in expert.own.items() if key not in expert.output}
        copy_expert(other, model, replace(expert, own=rest))
        assert torch.equal(model(images()), masked), expert.name
        loaded = used_model(model_name, seed=1)
        loaded.load_state_dict(after)
        assert torch.equal(loaded(images()), masked), expert.name


@pytest.mark.only(interface=WithFeatures)
@torch.no_grad()
def test_the_features_are_the_input_of_the_last_linear_layer(model_name: str) -> None:
    model = used_model(model_name)
    assert isinstance(model, WithFeatures)
    before, given = copies(model), images()
    features = model.extract_features(given)
    assert features.ndim == 2 and len(features) == 4 and features.is_floating_point()
    assert not torch.equal(features[0], features[1]), "the images make no difference"
    assert torch.equal(given, images()) and not changed(before, copies(model))
    assert torch.equal(model.classify(features), model(images()))
    # A linear layer with bias satisfies f(x) + f(-x) = 2 f(0).
    both = model.classify(features) + model.classify(-features)
    twice = 2 * model.classify(torch.zeros_like(features))
    torch.testing.assert_close(both, twice, rtol=1e-4, atol=1e-4)


@pytest.mark.only(interface=WithFeatures)
@torch.no_grad()
def test_the_features_come_before_the_head(model_name: str) -> None:
    """The features do not depend on the weights of the head."""
    model = used_model(model_name)
    assert isinstance(model, WithFeatures)
    if not isinstance(model, Structured) or not (head := model.components().get("head")):
        pytest.skip("does not name its head")
    features = model.extract_features(images())
    last = [m for module in head for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    assert last.weight.numel() // len(last.weight) == features.shape[1]
    last.weight.zero_()
    assert torch.equal(model.extract_features(images()), features)
    logits = model.classify(features)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))
