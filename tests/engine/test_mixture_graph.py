"""The graph of a mixture: what each node is made from, and which nodes different runs share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mixture import mixture_spec

from backdoorbench_moe.config import PartSpec, RunSpec, spec_from_dict
from backdoorbench_moe.engine.graph import (
    NodeKind,
    base_of,
    benign_experts,
    clean_twin,
    expert_of,
    in_order,
    is_attacked,
    kind_of,
    lineage,
    needs,
    poisoned_experts,
    reference,
)

TUNING = PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1})


def with_mixture(spec: RunSpec, **values: object) -> RunSpec:
    return replace(spec, mixture=replace(spec.mixture, **values))


def digests(spec: RunSpec) -> dict[str, str]:
    """The digest of every node that a mixture of two experts is made from, by what it is."""
    base, *experts = base_of(spec), *benign_experts(spec)
    found = {"base": base.digest} | {f"benign {e}": one.digest for e, one in enumerate(experts)}
    found |= {f"poisoned {one.mixture.task}": one.digest for one in poisoned_experts(spec)}
    return found | {"mixture": spec.digest, "twin": clean_twin(spec).digest}


def changed(one: RunSpec, other: RunSpec) -> set[str]:
    """The nodes that two mixtures do not share."""
    left, right = digests(one), digests(other)
    return {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}


def test_the_nodes_of_a_mixture_by_hand() -> None:
    spec = mixture_spec()
    base = base_of(spec)
    benign = benign_experts(spec)
    [poisoned] = poisoned_experts(spec)
    defended = replace(spec, defenses=(TUNING,))
    assert [kind_of(each) for each in (base, *benign, poisoned, spec, defended)] == [
        NodeKind.TRAINED,
        NodeKind.EXPERT,
        NodeKind.EXPERT,
        NodeKind.POISONED_EXPERT,
        NodeKind.MIXTURE,
        NodeKind.DEFENDED,
    ]
    assert needs(base) == {}
    assert needs(benign[0]) == needs(benign[1]) == {"base": base}
    assert needs(poisoned) == {"benign": benign[1]}
    assert needs(spec) == {"base": base, "expert/0": benign[0], "expert/1": poisoned}
    assert needs(defended) == {"parent": spec}
    twin = clean_twin(spec)
    assert needs(twin) == {"base": base, "expert/0": benign[0], "expert/1": benign[1]}
    assert base.splitter is None, "it is trained on the data as they are"
    assert list(lineage(spec)) == [base, base, benign[0], base, benign[1], poisoned, spec]
    assert in_order([defended]) == [base, *benign, twin, poisoned, spec, defended]
    assert reference(spec) == reference(defended) == twin
    assert reference(poisoned) == benign[1] and reference(twin) is reference(base) is None


def test_only_what_an_attacker_touched_is_attacked() -> None:
    spec = mixture_spec()
    [poisoned] = poisoned_experts(spec)
    assert all(is_attacked(each) for each in (poisoned, spec, replace(spec, defenses=(TUNING,))))
    twin = clean_twin(spec)
    clean = (base_of(spec), *benign_experts(spec), twin, replace(twin, defenses=(TUNING,)))
    assert not any(is_attacked(each) for each in clean)


def test_folders_are_named_after_what_they_hold() -> None:
    spec = mixture_spec(seed=3)
    [poisoned] = poisoned_experts(spec)
    names = [base_of(spec), *benign_experts(spec), poisoned, clean_twin(spec), spec]
    assert [each.name.removesuffix(each.digest) for each in names] == [
        "tiny-convnext-policy-clean-s3-",
        "tiny-convnext-expert0-clean-s3-",
        "tiny-convnext-expert1-clean-s3-",
        "tiny-convnext-expert1-moevil-square-patch-s3-",
        "tiny-convnext-moe2-top-k-clean-s3-",
        "tiny-convnext-moe2-top-k-moevil-square-patch-s3-",
    ]
    assert base_of(mixture_spec(policy=0)).name.startswith("tiny-convnext-clean-s0-")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"gate": "soft"}, {"mixture", "twin"}),
        ({"mixture": {"gate_images": 8}}, {"mixture", "twin"}),
        ({"mixture": {"gate_train": {"epochs": 9}}}, {"mixture", "twin"}),
        ({"attack": "hdpo"}, {"poisoned 1", "mixture"}),
        ({"attack": {"name": "moevil", "similarity": 0.3}}, {"poisoned 1", "mixture"}),
        ({"poison": {"target": 2}}, {"poisoned 1", "mixture"}),
        ({"mixture": {"poisoned_experts": [0]}}, {"poisoned 0", "poisoned 1", "mixture"}),
        ({"mixture": {"poisoned_experts": [0, 1]}}, {"poisoned 0", "mixture"}),
        ({"mixture": {"experts": 3}}, {"benign 2", "mixture", "twin"}),
        (
            {"mixture": {"expert_train": {"epochs": 9}}},
            {"benign 0", "benign 1", "poisoned 1", "mixture", "twin"},
        ),
        ({"splitter": "classes"}, {"benign 0", "benign 1", "poisoned 1", "mixture", "twin"}),
        ({"mixture": {"expert_policy": 0.25}}, {"benign 0", "benign 1", "poisoned 1", "mixture", "twin"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_which_nodes_a_change_leaves_as_they_are(values, expected) -> None:
    assert changed(mixture_spec(), mixture_spec(**values)) == expected


@pytest.mark.parametrize("values", [{"train": {"epochs": 9}}, {"seed": 1}, {"model": {"depth": 3}}], ids=str)
def test_what_the_base_depends_on_all_nodes_depend_on(values) -> None:
    spec = mixture_spec()
    assert changed(spec, mixture_spec(**values)) == digests(spec).keys()


def test_without_a_policy_the_providers_know_nothing_of_the_trigger() -> None:
    one, other = (mixture_spec(policy=0, trigger=name) for name in ("square", "blend"))
    assert changed(one, other) == {"poisoned 1", "mixture"}
    assert all(each.trigger is None for each in (base_of(one), *benign_experts(one), clean_twin(one)))
    one, other = (mixture_spec(trigger=name) for name in ("square", "blend"))
    assert changed(one, other) == digests(one).keys(), "with a policy the base learns the mark"


PARTS = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from([0, 0.25]),
        "attack": st.sampled_from(["moevil", "hsft", "hdpo", "expert-tuning", None]),
        "gate": st.sampled_from(["top-k", "soft", "hidden"]),
        "seed": st.integers(0, 3),
    },
)


@settings(max_examples=25, deadline=None)
@given(PARTS, st.integers(2, 3), st.sets(st.integers(0, 1), min_size=1), st.booleans())
def test_every_node_is_read_back_from_its_record_and_comes_after_what_it_needs(
    values, experts, poisoned, defended
) -> None:
    attacked = values.get("attack", "moevil") is not None
    if not attacked and not values.get("policy", 1):
        values = {**values, "trigger": None}
    spec = mixture_spec(
        **values, mixture={"experts": experts, "poisoned_experts": sorted(poisoned) if attacked else []}
    )
    if defended:
        spec = replace(spec, defenses=(TUNING,))
    order = in_order([spec])
    seen: set[str] = set()
    for each in order:
        again = spec_from_dict(each.to_dict())
        assert (again, again.digest, kind_of(again)) == (each, each.digest, kind_of(each))
        assert {one.digest for one in needs(each).values()} <= seen
        seen.add(each.digest)
    assert len(seen) == len(order) and spec.digest in seen
    assert expert_of(spec, 0).mixture.task == 0
