"""What a model that names its parts keeps to."""

from __future__ import annotations

import pytest
from defense_tasks import used_model

from backdoorbench_moe.models import list_models
from backdoorbench_moe.models.base import RoutedModel
from backdoorbench_moe.ops.structure import Structured

NAMES = [name if name != "timm" else "timm:test_resnet" for name in list_models()]


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_the_models_own_and_do_not_overlap(name: str) -> None:
    model = used_model(name)
    if not isinstance(model, Structured):
        pytest.skip("it does not name its parts")
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


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_pruned_lies_in_the_model(name: str) -> None:
    model = used_model(name)
    if not isinstance(model, Structured):
        pytest.skip("it does not name its parts")
    own, prunable = set(model.modules()), model.prunable()
    assert prunable.keys() <= {"experts", "trunk"}
    taken = set()
    for groups in prunable.values():
        for group in groups:
            assert group.conv in own and 0 <= group.start < group.stop <= group.conv.out_channels
            if group.norm is not None:
                assert group.norm in own and group.norm.num_features == group.conv.out_channels
            channels = {(id(group.conv), channel) for channel in range(group.start, group.stop)}
            assert len(channels) == len(group) and not channels & taken
            taken |= channels


def test_pmoe_is_its_trunk_router_experts_and_head() -> None:
    model = used_model("pmoe")
    named = {id(p) for modules in model.components().values() for m in modules for p in m.parameters()}
    rest = {name for name, p in model.named_parameters() if id(p) not in named}
    assert rest and all(name.startswith(("trunk.", "reduce_norm.", "reduce.")) for name in rest)
    experts = model.prunable()["experts"]
    assert [(group.start, group.stop) for group in experts] == [(0, 5), (5, 10), (10, 15), (15, 20)]
