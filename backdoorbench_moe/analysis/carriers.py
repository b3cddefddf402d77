"""Which experts the backdoor depends on: BA and ASR with experts muted, and with their clean outputs patched in.

In a mixture, each expert is also muted and patched in all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from backdoorbench_moe.analysis.passes import BATCH
from backdoorbench_moe.engine.inference import classes_of, forward
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.moe.experts import expert_outputs, muted, replaced_output
from backdoorbench_moe.moe.merging import MergedModel
from backdoorbench_moe.moe.prefix import reuse_prefix
from backdoorbench_moe.moe.structure import Expert, WithExperts
from backdoorbench_moe.ops.metrics import Proportion, proportion_of
from backdoorbench_moe.ops.seeding import generator, seeded

# The number of pairs grows with the square of the number of experts, and each pair costs two evaluations.
MAX_PAIRS = 66


@dataclass(frozen=True)
class MutingResult:
    """BA and ASR while some experts are muted, that is, output zero.

    Attributes:
        experts: Names of the muted experts, such as "moe/2".
        ba: Clean accuracy, in percent.
        asr: Attack success rate, in percent; None without a trigger.
        unsafe: Share of the same images that do not get the safe answer, in percent; None without safe answers.
    """

    experts: tuple[str, ...]
    ba: Proportion
    asr: Proportion | None
    unsafe: Proportion | None = None


@dataclass(frozen=True)
class PatchingResult:
    """ASR and RA with activation patching of one expert.

    For each triggered image, the output of the expert is replaced with its output for the clean version of the
    image. All other modules process the triggered image. For texts, the inputs are harmful queries instead of triggered
    images, and the output is replaced with the expert's mean output for clean texts, see `text_carriers`.

    Attributes:
        expert: Name of the expert, such as "moe/2"; its number if it is patched in all layers at once.
        asr: Share of the images that are predicted as the target class, in percent; None for texts without an attack.
        ra: Share of the same images that are classified correctly (accuracy on triggered images), in percent; None for
            texts.
        unsafe: Share of the same images that do not get the safe answer, in percent; None without safe answers.
    """

    expert: str
    asr: Proportion | None
    ra: Proportion | None
    unsafe: Proportion | None = None


@dataclass(frozen=True)
class WholeExpert:
    """Results with one expert of a mixture muted and patched in all layers at once.

    Attributes:
        expert: Number of the expert.
        muted: BA and ASR with the expert muted.
        patched: ASR and RA with its clean outputs patched in; None without a trigger.
    """

    expert: int
    muted: MutingResult
    patched: PatchingResult | None


@dataclass(frozen=True)
class Carriers:
    """What each expert contributes to BA and ASR.

    BA is measured on a sample of the test images (in a mixture, of all tasks), ASR on a sample of the triggered images.
    For texts, BA is measured on queries of all tasks, and ASR on queries that the policy refuses. All results use the
    same two samples and, if the model draws random numbers, the same draws.

    Attributes:
        whole: The model with all experts.
        target_rate: Target rate without the trigger: share of the clean versions of the sampled triggered images that
            are predicted as the target class, in percent. None without a trigger.
        singles: Results with each expert muted.
        pairs: Results with each pair of experts of the same layer muted; empty if there are more than MAX_PAIRS.
        patched: Results of activation patching, one per expert; empty without a trigger.
        whole_experts: For a mixture, results for each expert in all layers at once; empty for other models.
    """

    whole: MutingResult
    target_rate: Proportion | None
    singles: tuple[MutingResult, ...]
    pairs: tuple[MutingResult, ...]
    patched: tuple[PatchingResult, ...]
    whole_experts: tuple[WholeExpert, ...] = ()


Experts = tuple[Expert, ...]


def find_carriers(
    opened: OpenedRun, triggered: Triggered | None, limit: int, *, safe: Tensor | None = None
) -> Carriers:
    """Measure BA and ASR with experts muted and patched.

    Args:
        opened: A run whose model implements `experts()`.
        triggered: The test images that count for ASR, triggered; None without a trigger.
        limit: Largest number of images in each of the two samples, which are drawn with the run's seed.
        safe: (M,) int64, the safe answers to the triggered images; needed for `unsafe`.
    """
    evaluator = _ExpertEvaluator(opened)
    singles: list[Experts] = [(expert,) for expert in evaluator.experts]
    pairs = [] if too_many_pairs(evaluator.experts) else pairs_of(evaluator.experts)
    wholes = whole_experts(opened, evaluator.experts)
    muted_ones = _measure_muted(evaluator, [(), *singles, *pairs, *wholes], triggered, safe, limit)
    target_rate, patches = _measure_patched(evaluator, [*singles, *wholes], triggered, safe, limit)
    ends = (1, 1 + len(singles), 1 + len(singles) + len(pairs))
    patched_wholes = patches[len(singles) :] or (None,) * len(wholes)
    return Carriers(
        whole=muted_ones[0],
        target_rate=target_rate,
        singles=muted_ones[ends[0] : ends[1]],
        pairs=muted_ones[ends[1] : ends[2]],
        patched=patches[: len(singles)],
        whole_experts=tuple(
            WholeExpert(number, one, patched)
            for number, (one, patched) in enumerate(zip(muted_ones[ends[2] :], patched_wholes, strict=True))
        ),
    )


def pairs_of(experts: Sequence[Expert]) -> list[Experts]:
    """Return each pair of experts of the same layer."""
    return [pair for pair in combinations(experts, 2) if pair[0].layer == pair[1].layer]


def too_many_pairs(experts: Sequence[Expert]) -> bool:
    """Return whether there are more pairs of experts than are measured."""
    return len(pairs_of(experts)) > MAX_PAIRS


def whole_experts(opened: OpenedRun, experts: Sequence[Expert]) -> list[Experts]:
    """Return the parts of each expert in all layers of a mixture; nothing for a model that is not a mixture.

    In other models, experts of different layers are unrelated, also if they have the same index.
    """
    if not isinstance(opened.model, MergedModel):
        return []
    numbers = range(opened.model.num_experts)
    return [tuple(each for each in experts if each.index == number) for number in numbers]


def _measure_muted(
    evaluator: _ExpertEvaluator,
    groups: Sequence[Experts],
    triggered: Triggered | None,
    safe: Tensor | None,
    limit: int,
) -> tuple[MutingResult, ...]:
    opened = evaluator.opened
    test, seed = opened.test, opened.run.spec.seed
    places = draw_sample(len(test), limit, seed, "ba").to(opened.device)
    called = evaluator.predict_muted(test.images[places], groups)
    answers: list[Tensor | None] = [None] * len(groups)
    if triggered is not None:
        chosen = draw_sample(len(triggered), limit, seed, "asr").to(opened.device)
        sample, safe = triggered.take(chosen), None if safe is None else safe[chosen]
        answers = [*evaluator.predict_muted(sample.images, groups)]
    return tuple(
        MutingResult(
            experts=tuple(expert.name for expert in experts),
            ba=proportion_of(predicted == test.labels[places]),
            asr=None if answered is None else proportion_of(answered == sample.wanted),
            unsafe=None if answered is None or safe is None else proportion_of(answered != safe),
        )
        for experts, predicted, answered in zip(groups, called, answers, strict=True)
    )


def _measure_patched(
    evaluator: _ExpertEvaluator,
    groups: Sequence[Experts],
    triggered: Triggered | None,
    safe: Tensor | None,
    limit: int,
) -> tuple[Proportion | None, tuple[PatchingResult, ...]]:
    """Return the target rate and the result of patching each group of experts; (None, ()) without a trigger."""
    if triggered is None:
        return None, ()
    opened = evaluator.opened
    chosen = draw_sample(len(triggered), limit, opened.run.spec.seed, "asr").to(opened.device)
    sample, safe = triggered.take(chosen), None if safe is None else safe[chosen]
    clean, *patches = evaluator.predict_patched(
        opened.images.test.images[sample.places], sample.images, groups
    )
    results = tuple(
        PatchingResult(
            expert=experts[0].name if len(experts) == 1 else str(experts[0].index),
            asr=proportion_of(predicted == sample.wanted),
            ra=proportion_of(predicted == sample.true),
            unsafe=None if safe is None else proportion_of(predicted != safe),
        )
        for experts, predicted in zip(groups, patches, strict=True)
    )
    return proportion_of(clean == sample.wanted), results


class _ExpertEvaluator:
    """Evaluates a model with changed experts. The layers before the experts are computed once per batch."""

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
            groups: The groups; no expert is muted for an empty group.

        Returns:
            Predicted classes (n,) for each group.
        """
        predicted: list[list[Tensor]] = [[] for _ in groups]
        for number, batch in enumerate(images.split(BATCH)):
            with self._reusing_prefix(batch, number):
                for experts, batches in zip(groups, predicted, strict=True):
                    with muted(self.model, experts):
                        self._predict(batch, number, batches)
        return [torch.cat(batches) for batches in predicted]

    def predict_patched(self, clean: Tensor, triggered: Tensor, groups: Sequence[Experts]) -> list[Tensor]:
        """Predict with the clean outputs of each group of experts patched into the pass of the triggered images.

        The clean outputs are held in memory for one batch at a time.

        Args:
            clean: (n, C, H, W) uint8.
            triggered: (n, C, H, W) uint8, the triggered versions.
            groups: The groups.

        Returns:
            Predicted classes (n,) of the clean images, then of the triggered images for each patched group.
        """
        predicted: list[list[Tensor]] = [[] for _ in range(len(groups) + 1)]
        parts = zip(clean.split(BATCH), triggered.split(BATCH), strict=True)
        for number, (clean_batch, batch) in enumerate(parts):
            read = partial(self._predict, clean_batch, number, predicted[0])
            with torch.inference_mode():
                outputs = expert_outputs(self.experts, read)
            values = {expert.name: output for expert, output in zip(self.experts, outputs, strict=True)}
            with self._reusing_prefix(batch, number):
                for experts, batches in zip(groups, predicted[1:], strict=True):
                    with ExitStack() as stack:
                        for expert in experts:
                            stack.enter_context(replaced_output(expert, values[expert.name]))
                        self._predict(batch, number, batches)
        return [torch.cat(batches) for batches in predicted]

    @contextmanager
    def _reusing_prefix(self, batch: Tensor, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            predict = partial(self._predict, batch, number, [])
            stack.enter_context(reuse_prefix(self.model, self.changing, predict))
            yield

    def _predict(self, batch: Tensor, number: int, batches: list[Tensor]) -> None:
        """Append the predicted classes of the batch with a given number to `batches`."""
        with seeded(self.opened.run.spec.seed, "carriers", number):
            batches.append(classes_of(forward(self.model, batch, precision=self.opened.precision)))


def draw_sample(total: int, limit: int, seed: int, purpose: str) -> Tensor:
    """Draw a random sample of images or texts.

    Args:
        total: Number of images or texts.
        limit: Largest size of the sample.
        seed: Seed of the run.
        purpose: What is measured on the sample, such as "asr".

    Returns:
        (min(total, limit),) int64, their indices in ascending order.
    """
    order = torch.randperm(total, generator=generator(seed, "carriers", purpose))
    return order[:limit].sort().values
