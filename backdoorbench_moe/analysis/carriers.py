"""Which experts carry the backdoor: BA and ASR with experts muted, and with their clean outputs patched in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from backdoorbench_moe.analysis.capture import proportion_of
from backdoorbench_moe.analysis.opened_run import OpenedRun
from backdoorbench_moe.analysis.passes import BATCH
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.triggered import Triggered
from backdoorbench_moe.moe.experts import expert_outputs, muted, replaced_output
from backdoorbench_moe.moe.prefix import reuse_prefix
from backdoorbench_moe.moe.structure import Expert, WithExperts
from backdoorbench_moe.ops.metrics import Proportion
from backdoorbench_moe.ops.seeding import generator

# The number of pairs grows with the square of the number of experts, and each pair costs two evaluations.
MAX_PAIRS = 66


@dataclass(frozen=True)
class MutingResult:
    """BA and ASR while some experts are muted, that is, output zero.

    Attributes:
        experts: Names of the muted experts, such as "moe/2".
        ba: Clean accuracy, in percent.
        asr: Attack success rate, in percent; None without a trigger.
    """

    experts: tuple[str, ...]
    ba: Proportion
    asr: Proportion | None


@dataclass(frozen=True)
class PatchingResult:
    """ASR and RA with activation patching of one expert.

    For each triggered image, the output of the expert is replaced with its output for the clean version of the
    image. All other modules process the triggered image.

    Attributes:
        expert: Name of the expert, such as "moe/2".
        asr: Share of the images that are classified as the attacker wants, in percent.
        ra: Share of the same images that are classified correctly (accuracy on triggered images), in percent.
    """

    expert: str
    asr: Proportion
    ra: Proportion


@dataclass(frozen=True)
class Carriers:
    """What each expert contributes to BA and ASR.

    BA is measured on a sample of the test images, ASR on a sample of the triggered images. All results use the
    same two samples.

    Attributes:
        whole: The model with all experts.
        target_rate: Target rate without the trigger: share of the clean versions of the sampled triggered images that
            are classified as the attacker wants, in percent. None without a trigger.
        singles: Results with each expert muted.
        pairs: Results with each two experts of one layer muted; empty if there are more than MAX_PAIRS.
        patched: Results of activation patching, one per expert; empty without a trigger.
    """

    whole: MutingResult
    target_rate: Proportion | None
    singles: tuple[MutingResult, ...]
    pairs: tuple[MutingResult, ...]
    patched: tuple[PatchingResult, ...]


Experts = tuple[Expert, ...]


def find_carriers(opened: OpenedRun, triggered: Triggered | None, limit: int) -> Carriers:
    """Measure BA and ASR with experts muted and patched.

    Args:
        opened: A run whose model has `experts()`.
        triggered: The test images that count for ASR, triggered; None without a trigger.
        limit: Largest number of images in each of the two samples, which are drawn with the run's seed.
    """
    evaluator, seed, test = _ExpertEvaluator(opened), opened.run.spec.seed, opened.images.test
    singles = [(expert,) for expert in evaluator.experts]
    pairs = [pair for pair in combinations(evaluator.experts, 2) if pair[0].layer == pair[1].layer]
    groups: list[Experts] = [(), *singles, *(pairs if len(pairs) <= MAX_PAIRS else ())]

    places = _draw(len(test), limit, seed, "ba").to(opened.device)
    ba = [
        _proportion(predicted == test.labels[places])
        for predicted in evaluator.predict_muted(test.images[places], groups)
    ]
    asr: list[Proportion | None] = [None] * len(groups)
    target_rate: Proportion | None = None
    patched: tuple[PatchingResult, ...] = ()
    if triggered is not None:
        chosen = _draw(len(triggered), limit, seed, "asr").to(opened.device)
        sample = triggered.take(chosen)
        asr = [
            _proportion(predicted == sample.wanted)
            for predicted in evaluator.predict_muted(sample.images, groups)
        ]
        clean, *patches = evaluator.predict_patched(test.images[sample.places], sample.images)
        target_rate = _proportion(clean == sample.wanted)
        patched = tuple(
            PatchingResult(
                expert.name, _proportion(predicted == sample.wanted), _proportion(predicted == sample.true)
            )
            for expert, predicted in zip(evaluator.experts, patches, strict=True)
        )
    whole, *rest = (
        MutingResult(tuple(expert.name for expert in experts), b, a)
        for experts, b, a in zip(groups, ba, asr, strict=True)
    )
    return Carriers(whole, target_rate, tuple(rest[: len(singles)]), tuple(rest[len(singles) :]), patched)


class _ExpertEvaluator:
    """Evaluates a model with changed experts; what precedes the experts is computed once per batch."""

    def __init__(self, opened: OpenedRun) -> None:
        model = opened.model
        assert isinstance(model, WithExperts)
        self.opened, self.model, self.experts = opened, opened.model, model.experts()
        owners = {name.rpartition(".")[0] for expert in self.experts for name in expert.output}
        self.changing = {*map(opened.model.get_submodule, owners), *(e.tap for e in self.experts)}

    def predict_muted(self, images: Tensor, groups: Sequence[Experts]) -> list[Tensor]:
        """Predict with each group of experts muted.

        Args:
            images: (n, C, H, W) uint8.
            groups: The groups; an empty one mutes nothing.

        Returns:
            Predicted classes (n,) for each group.
        """
        predicted: list[list[Tensor]] = [[] for _ in groups]
        for batch in images.split(BATCH):
            with self._reusing_prefix(batch):
                for experts, batches in zip(groups, predicted, strict=True):
                    with muted(self.model, experts):
                        self._predict(batch, batches)
        return [torch.cat(batches) for batches in predicted]

    def predict_patched(self, clean: Tensor, triggered: Tensor) -> list[Tensor]:
        """Predict with the clean output of each expert patched into the pass of the triggered images.

        The clean outputs are held in memory for one batch at a time.

        Args:
            clean: (n, C, H, W) uint8.
            triggered: (n, C, H, W) uint8, the triggered versions.

        Returns:
            Predicted classes (n,) of the clean images, then of the triggered ones for each patched expert.
        """
        predicted: list[list[Tensor]] = [[] for _ in range(len(self.experts) + 1)]
        for clean_batch, batch in zip(clean.split(BATCH), triggered.split(BATCH), strict=True):
            with torch.inference_mode():
                outputs = expert_outputs(self.experts, partial(self._predict, clean_batch, predicted[0]))
            with self._reusing_prefix(batch):
                for expert, values, batches in zip(self.experts, outputs, predicted[1:], strict=True):
                    with replaced_output(expert, values):
                        self._predict(batch, batches)
        return [torch.cat(batches) for batches in predicted]

    @contextmanager
    def _reusing_prefix(self, batch: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(reuse_prefix(self.model, self.changing, partial(self._predict, batch, [])))
            yield

    def _predict(self, batch: Tensor, batches: list[Tensor]) -> None:
        """Append the predicted classes of a batch to `batches`."""
        batches.append(forward(self.model, batch, precision=self.opened.precision).argmax(1))


def _draw(total: int, limit: int, seed: int, purpose: str) -> Tensor:
    order = torch.randperm(total, generator=generator(seed, "carriers", purpose))
    return order[:limit].sort().values


def _proportion(hits: Tensor) -> Proportion:
    found = proportion_of(hits)
    assert found is not None
    return found
