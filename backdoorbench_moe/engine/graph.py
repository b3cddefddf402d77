"""Runs as a graph: what a run is made from, and what it is compared with.

A node is a spec. Nodes that several runs need are projections of these runs' specs, so that equal ones have equal
digests and are made once. Nothing else in the package knows these relations.

A mixture of experts is made from a base, on which each expert is tuned, and an attacker tunes an expert further:

    base -> expert 0 .. E-1 -> poisoned expert -> mixture -> defended mixture

A victim whose trigger is optimised on a surrogate is made from the surrogate, a clean run. An imported model is made
from a file, and is compared with nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from types import MappingProxyType

from backdoorbench_moe.config import SAME, TWIN, PartSpec, PoisonSpec, RunSpec

PARENT, BASE, BENIGN, SURROGATE = "parent", "base", "benign", "surrogate"


class NodeKind(Enum):
    """How a run is made."""

    TRAINED = "trained from data"
    EXPERT = "tuned from the base on one task"
    POISONED_EXPERT = "tuned from the benign expert by an attacker"
    MIXTURE = "merged from experts"
    DEFENDED = "defended"
    IMPORTED = "imported from a file"


# A table or a plan asks for the relations of the same few specs thousands of times.
kept = functools.lru_cache(maxsize=16384)


def kind_of(spec: RunSpec) -> NodeKind:
    """How a run is made."""
    if spec.defenses:
        return NodeKind.DEFENDED
    if spec.imported:
        return NodeKind.IMPORTED
    if spec.mixture is None:
        return NodeKind.TRAINED
    if spec.mixture.task is None:
        return NodeKind.MIXTURE
    return NodeKind.POISONED_EXPERT if spec.attacked else NodeKind.EXPERT


def expert_role(expert: int) -> str:
    """The role of an expert among the runs that a mixture is made from, such as "expert/0"."""
    return f"expert/{expert}"


@kept
def needs(spec: RunSpec) -> Mapping[str, RunSpec]:
    """The runs that a run is made from, by their role.

    A defended run is made from its "parent": the same run without the last defense. A mixture is made from its "base"
    and from "expert/0" to "expert/E-1", an expert from the "base", and a poisoned expert from the "benign" one. A
    victim whose trigger is optimised is made from the "surrogate". Any other run is made from data, or a file, alone.
    """
    return MappingProxyType(_needs(spec))


def _needs(spec: RunSpec) -> dict[str, RunSpec]:
    kind, mixture = kind_of(spec), spec.mixture
    if kind is NodeKind.DEFENDED:
        return {PARENT: replace(spec, defenses=spec.defenses[:-1])}
    if kind is NodeKind.IMPORTED:
        return {}
    if kind is NodeKind.TRAINED:
        surrogate = surrogate_of(spec)
        return {} if surrogate is None else {SURROGATE: surrogate}
    assert mixture is not None
    if kind is NodeKind.EXPERT:
        return {BASE: base_of(spec)}
    if kind is NodeKind.POISONED_EXPERT:
        assert mixture.task is not None
        return {BENIGN: expert_of(clean_twin(spec), mixture.task)}
    experts = {expert_role(e): expert_of(spec, e) for e in range(mixture.experts)}
    return {BASE: base_of(spec), **experts}


def surrogate_of(spec: RunSpec) -> RunSpec | None:
    """The clean run on which the attacker optimises the trigger; None if the trigger is not optimised.

    The option `surrogate` of the trigger says which: see `triggers.optimised.OptimisedTrigger`. The next seed is used
    for a twin, so that repeats of an experiment share surrogates and clean twins.
    """
    if not spec.attacked or spec.trigger is None:
        return None
    chosen = spec.trigger.options.get("surrogate")
    if not isinstance(chosen, str):
        return None
    clean = clean_twin(spec)
    if chosen == SAME:
        return clean
    if chosen == TWIN:
        return replace(clean, seed=spec.seed + 1)
    assert spec.surrogate is not None
    # Another model has other parameters.
    train = replace(spec.train, freeze=())
    return replace(clean, model=spec.surrogate, train=train, files=_surrogate_files(spec))


def _surrogate_files(spec: RunSpec) -> dict[str, str]:
    """The files of a surrogate of another architecture: its model is the surrogate instead of the victim's."""
    others = {key: known for key, known in spec.files.items() if not key.startswith("model.")}
    prefix = "surrogate."
    return {
        f"model.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: known
        for key, known in others.items()
    }


def base_of(spec: RunSpec) -> RunSpec:
    """The base of a mixture or of an expert: a clean dense model, trained on the data as they are and on the policy."""
    return replace(clean_twin(spec), splitter=None, gate=None, mixture=None)


def expert_of(spec: RunSpec, expert: int) -> RunSpec:
    """One expert of a mixture: the attacker's if it is one of `mixture.poisoned_experts`, otherwise a benign one."""
    assert spec.mixture is not None
    poisoned = expert in spec.mixture.poisoned_experts or (spec.attacked and spec.mixture.task == expert)
    kept = replace(spec, defenses=(), probe=0) if poisoned else clean_twin(spec)
    return replace(kept, gate=None, mixture=spec.mixture.for_task(expert))


def benign_experts(spec: RunSpec) -> list[RunSpec]:
    """The benign expert of each task of a mixture; for a poisoned expert the one that the attacker started from."""
    assert spec.mixture is not None
    return [expert_of(clean_twin(spec), e) for e in range(spec.mixture.experts)]


def poisoned_experts(spec: RunSpec) -> list[RunSpec]:
    """The poisoned experts of a mixture."""
    assert spec.mixture is not None
    return [expert_of(spec, e) for e in spec.mixture.poisoned_experts]


def reference(spec: RunSpec) -> RunSpec | None:
    """The clean run that an attacked or defended run is compared with; None for a clean, undefended one.

    An imported model has none, defended or not: nobody knows how to make it without an attack.

    It has no attack, defense or probe, so all attacks on the same data, model, recipe and seed share it.
    """
    return clean_twin(spec) if spec.attacked or (spec.defenses and not spec.imported) else None


@kept
def clean_twin(spec: RunSpec) -> RunSpec:
    """The same run without attack, defense or probe; of a clean run itself, without defense or probe.

    The twin of a mixture has benign experts only. With a policy, the twin keeps the mark of the images to reject.
    """
    clean = PoisonSpec(rate=0.0)
    mark: tuple[PartSpec | None, PartSpec | None] = (None, None)
    if spec.policy:
        mark = spec.trigger, spec.applicator
    mixture = None if spec.mixture is None else replace(spec.mixture, poisoned_experts=())
    return replace(
        spec,
        attack=None,
        trigger=mark[0],
        applicator=mark[1],
        surrogate=None,
        poison=clean,
        mixture=mixture,
        defenses=(),
        probe=0,
    )


def lineage(spec: RunSpec) -> Iterator[RunSpec]:
    """All runs that a run is made from, each after those that it needs itself; the run comes last.

    A run that several others need is repeated.
    """
    for needed in needs(spec).values():
        yield from lineage(needed)
    yield spec


def in_order(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """These runs and all that they need or are compared with, each once, in an order in which they can be made.

    Clean undefended runs come first, so that a comparison is possible as soon as an attacked run is finished.
    """
    found: dict[str, RunSpec] = {}
    for spec in specs:
        twin = reference(spec)
        for each in (*lineage(spec), *(() if twin is None else lineage(twin))):
            found.setdefault(each.digest, each)
    return sorted(found.values(), key=lambda each: (each.attacked, len(each.defenses), _depth(each)))


def _depth(spec: RunSpec) -> int:
    return max((1 + _depth(needed) for needed in needs(spec).values()), default=0)


def is_attacked(spec: RunSpec) -> bool:
    """Whether there is an attack anywhere in the making of a run."""
    return any(each.attacked for each in lineage(spec))
