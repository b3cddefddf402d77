"""The graph of runs: which runs a run is built from, and which run it is compared with.

A node is a spec. Nodes that several runs need are derived from the specs of these runs, so that equal nodes have equal
digests and are run only once. These relations are defined only here.

A mixture is built from experts that are fine-tuned from a base. An attacker fine-tunes an expert further:

    base -> expert 0 .. E-1 -> poisoned expert -> mixture -> defended mixture

A victim whose trigger is optimised on a surrogate, a clean run, is built from the surrogate. An imported model is built
from a file, and is not compared with another run.
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
    """How a run is built."""

    TRAINED = "trained from data"
    EXPERT = "tuned from the base on one task"
    POISONED_EXPERT = "tuned from the benign expert by an attacker"
    MIXTURE = "merged from experts"
    DEFENDED = "defended"
    IMPORTED = "imported from a file"


# Tables and plans look up the relations of the same few specs thousands of times.
kept = functools.lru_cache(maxsize=16384)


def kind_of(spec: RunSpec) -> NodeKind:
    """How a run is built."""
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
    """The role of an expert among the runs that a mixture is built from, such as "expert/0"."""
    return f"expert/{expert}"


@kept
def needs(spec: RunSpec) -> Mapping[str, RunSpec]:
    """The runs that a run is built from, by role.

    A defended run is built from its "parent", the same run without the last defense; a mixture from its "base" and
    "expert/0" to "expert/E-1"; an expert from the "base"; a poisoned expert from the "benign" one; and a victim whose
    trigger is optimised from the "surrogate". Any other run is built only from data or a file.
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

    The trigger's option `surrogate` selects it; see `triggers.optimised.OptimisedTrigger`. A twin has the next seed, so
    that repeats of an experiment share surrogates and clean twins.
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
    # The names of the frozen parameters are those of the victim's model.
    train = replace(spec.train, freeze=())
    return replace(clean, model=spec.surrogate, train=train, files=_surrogate_files(spec))


def _surrogate_files(spec: RunSpec) -> dict[str, str]:
    """The files of a surrogate with another architecture: those of its model replace those of the victim's model."""
    others = {key: known for key, known in spec.files.items() if not key.startswith("model.")}
    prefix = "surrogate."
    return {
        f"model.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: known
        for key, known in others.items()
    }


def base_of(spec: RunSpec) -> RunSpec:
    """The base of a mixture or of an expert: a clean dense model, trained on the complete data and on the policy."""
    return replace(clean_twin(spec), splitter=None, gate=None, mixture=None)


def expert_of(spec: RunSpec, expert: int) -> RunSpec:
    """One expert of a mixture: the attacker's if it is in `mixture.poisoned_experts`, otherwise a benign one."""
    assert spec.mixture is not None
    poisoned = expert in spec.mixture.poisoned_experts or (spec.attacked and spec.mixture.task == expert)
    kept = replace(spec, defenses=(), probe=0) if poisoned else clean_twin(spec)
    return replace(kept, gate=None, mixture=spec.mixture.for_task(expert))


def benign_experts(spec: RunSpec) -> list[RunSpec]:
    """The benign expert of each task of a mixture; for a poisoned expert, the one that the attacker started from."""
    assert spec.mixture is not None
    return [expert_of(clean_twin(spec), e) for e in range(spec.mixture.experts)]


def poisoned_experts(spec: RunSpec) -> list[RunSpec]:
    """The poisoned experts of a mixture."""
    assert spec.mixture is not None
    return [expert_of(spec, e) for e in spec.mixture.poisoned_experts]


def reference(spec: RunSpec) -> RunSpec | None:
    """The clean run that an attacked or defended run is compared with; None for a clean undefended run.

    It has no attack, defense or probe, so all attacks on the same data, model, recipe and seed share it. An imported
    model has no reference, defended or not, since it cannot be retrained without an attack.
    """
    return clean_twin(spec) if spec.attacked or (spec.defenses and not spec.imported) else None


@kept
def clean_twin(spec: RunSpec) -> RunSpec:
    """The same run without attack, defense or probe.

    The twin of a mixture has only benign experts. With a policy, the twin keeps the trigger as the mark of the images
    to reject.
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
    """All runs that a run is built from, each after the runs that it needs, and finally the run itself.

    A run that several others need occurs several times.
    """
    for needed in needs(spec).values():
        yield from lineage(needed)
    yield spec


def in_order(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """These runs and all runs that they need or are compared with, each once, in an order in which they can be run.

    Clean undefended runs come first, so that an attacked run can be compared as soon as it is finished.
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
    """Whether a run, or any run that it is built from, has an attack."""
    return any(each.attacked for each in lineage(spec))
