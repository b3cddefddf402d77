"""Who carries the backdoor: experts muted, and their outputs for triggered images replaced by those for clean ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from backdoorbench_moe.analysis.capture import share
from backdoorbench_moe.analysis.passes import BATCH
from backdoorbench_moe.analysis.subject import Subject
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.triggered import Triggered
from backdoorbench_moe.moe.experts import expert_outputs, muted, replaced_output
from backdoorbench_moe.moe.prefix import reuse_prefix
from backdoorbench_moe.moe.structure import Expert, WithExperts
from backdoorbench_moe.ops.metrics import Proportion
from backdoorbench_moe.ops.seeding import generator

# Pairs grow with the square of the experts, and each costs two evaluations.
MAX_PAIRS = 66


@dataclass(frozen=True)
class Muted:
    """BA and ASR with these experts (their names, such as "moe/2") without effect; asr is None without a trigger."""

    experts: tuple[str, ...]
    ba: Proportion
    asr: Proportion | None


@dataclass(frozen=True)
class Patched:
    """One expert gives for each triggered image what it gives for the clean version; the rest sees the trigger.

    asr: share called what the attacker wants. ra: share of the same images called what they are.
    """

    expert: str
    asr: Proportion
    ra: Proportion


@dataclass(frozen=True)
class Carriers:
    """Measured on images drawn once: of the whole test set for BA, of those that ASR counts for ASR.

    whole: with all experts. clean_called_wanted: share of the clean versions that are called what the attacker
    wants, the least that ASR can be expected to fall to. singles: each expert muted. pairs: each two of one
    layer; empty where there are more than MAX_PAIRS. patched: activation patching, expert by expert; empty
    without a trigger.
    """

    whole: Muted
    clean_called_wanted: Proportion | None
    singles: tuple[Muted, ...]
    pairs: tuple[Muted, ...]
    patched: tuple[Patched, ...]


Experts = tuple[Expert, ...]


def find_carriers(subject: Subject, triggered: Triggered | None, limit: int) -> Carriers:
    """Mute and patch the experts of a model that says where they lie.

    limit: at most so many images for BA, and for ASR. They are drawn by the run's seed.
    """
    probe, seed, test = _Probe(subject), subject.run.spec.seed, subject.images.test
    singles = [(expert,) for expert in probe.experts]
    pairs = [pair for pair in combinations(probe.experts, 2) if pair[0].layer == pair[1].layer]
    off: list[Experts] = [(), *singles, *(pairs if len(pairs) <= MAX_PAIRS else ())]

    places = _draw(len(test), limit, seed, "ba").to(subject.device)
    ba = [_share(called == test.labels[places]) for called in probe.without(test.images[places], off)]
    asr: list[Proportion | None] = [None] * len(off)
    floor: Proportion | None = None
    patched: tuple[Patched, ...] = ()
    if triggered is not None:
        chosen = _draw(len(triggered), limit, seed, "asr").to(subject.device)
        sample = triggered.take(chosen)
        asr = [_share(called == sample.wanted) for called in probe.without(sample.images, off)]
        clean, *patches = probe.patched(test.images[sample.places], sample.images)
        floor = _share(clean == sample.wanted)
        patched = tuple(
            Patched(expert.name, _share(called == sample.wanted), _share(called == sample.true))
            for expert, called in zip(probe.experts, patches, strict=True)
        )
    whole, *rest = (
        Muted(tuple(expert.name for expert in experts), b, a)
        for experts, b, a in zip(off, ba, asr, strict=True)
    )
    return Carriers(whole, floor, tuple(rest[: len(singles)]), tuple(rest[len(singles) :]), patched)


class _Probe:
    """A model with its experts; what comes before them is computed once for each batch."""

    def __init__(self, subject: Subject) -> None:
        model = subject.model
        assert isinstance(model, WithExperts)
        self.subject, self.model, self.experts = subject, subject.model, model.experts()
        owners = {name.rpartition(".")[0] for expert in self.experts for name in expert.output}
        self.changing = {*map(subject.model.get_submodule, owners), *(e.tap for e in self.experts)}

    def without(self, images: Tensor, off: Sequence[Experts]) -> list[Tensor]:
        """Predicted classes (n,) of (n, C, H, W) uint8 images with each of these groups of experts muted."""
        found: list[list[Tensor]] = [[] for _ in off]
        for batch in images.split(BATCH):
            with self._repeating(batch):
                for experts, into in zip(off, found, strict=True):
                    with muted(self.model, experts):
                        self._call(batch, into)
        return [torch.cat(parts) for parts in found]

    def patched(self, clean: Tensor, triggered: Tensor) -> list[Tensor]:
        """Predicted classes (n,) of the clean images, then of the triggered ones with each expert patched.

        What the experts give for the clean images is held for one batch only.
        """
        found: list[list[Tensor]] = [[] for _ in range(len(self.experts) + 1)]
        for one, other in zip(clean.split(BATCH), triggered.split(BATCH), strict=True):
            with torch.inference_mode():
                outputs = expert_outputs(self.experts, partial(self._call, one, found[0]))
            with self._repeating(other):
                for expert, values, into in zip(self.experts, outputs, found[1:], strict=True):
                    with replaced_output(expert, values):
                        self._call(other, into)
        return [torch.cat(parts) for parts in found]

    @contextmanager
    def _repeating(self, batch: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(reuse_prefix(self.model, self.changing, partial(self._call, batch, [])))
            yield

    def _call(self, batch: Tensor, into: list[Tensor]) -> None:
        into.append(forward(self.model, batch, precision=self.subject.precision).argmax(1))


def _draw(total: int, limit: int, seed: int, purpose: str) -> Tensor:
    order = torch.randperm(total, generator=generator(seed, "carriers", purpose))
    return order[:limit].sort().values


def _share(hits: Tensor) -> Proportion:
    found = share(hits)
    assert found is not None
    return found
