"""Runs as a graph: what a run is made from, and what it is compared with.

A node is a spec. Nodes that several runs need are projections of these runs' specs, so that equal ones have equal
digests and are made once. Nothing else in the package knows these relations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from backdoorbench_moe.config import PoisonSpec, RunSpec

PARENT = "parent"


def needs(spec: RunSpec) -> Mapping[str, RunSpec]:
    """The runs that a run is made from, by their role.

    A defended run is made from its "parent": the same run without the last defense. Any other run is made from
    data alone.
    """
    if spec.defenses:
        return {PARENT: replace(spec, defenses=spec.defenses[:-1])}
    return {}


def reference(spec: RunSpec) -> RunSpec | None:
    """The clean run that an attacked or defended run is compared with; None for a clean, undefended run.

    It has no attack, defense or probe, so all attacks on the same data, model, recipe and seed share it.
    """
    return clean_twin(spec) if spec.attacked or spec.defenses else None


def clean_twin(spec: RunSpec) -> RunSpec:
    """The same run without attack, defense or probe; of a clean run itself, without defense or probe."""
    clean = PoisonSpec(rate=0.0)
    return replace(spec, attack=None, trigger=None, applicator=None, poison=clean, defenses=(), probe=0)


def lineage(spec: RunSpec) -> Iterator[RunSpec]:
    """All runs that a run is made from, each after those that it needs itself; the run comes last."""
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
        for each in (*lineage(spec), *(() if twin is None else (twin,))):
            found.setdefault(each.digest, each)
    return sorted(found.values(), key=lambda each: (each.attacked, len(each.defenses)))


def is_attacked(spec: RunSpec) -> bool:
    """Whether there is an attack anywhere in the making of a run."""
    return any(each.attacked for each in lineage(spec))
