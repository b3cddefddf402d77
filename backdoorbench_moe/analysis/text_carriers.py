"""Which experts of a mixture of language models answer harmful queries: each one muted and patched in all layers.

A harmful query has no clean version that could provide an expert's clean outputs. The outputs of an expert are
therefore replaced with its mean output for clean texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from backdoorbench_moe.analysis.carriers import (
    Carriers,
    MutingResult,
    PatchingResult,
    WholeExpert,
    draw_sample,
    whole_experts,
)
from backdoorbench_moe.data.text import RefusedQueries, TextSet
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.measuring.texts import ask
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.moe.experts import expert_outputs, muted, replaced_output
from backdoorbench_moe.moe.merging import MergedModel
from backdoorbench_moe.moe.structure import Expert
from backdoorbench_moe.ops.answers import mean_weights, text_positions
from backdoorbench_moe.ops.images import Split, batches
from backdoorbench_moe.ops.metrics import Proportion, proportion_of
from backdoorbench_moe.ops.seeding import seeded


def find_text_carriers(opened: OpenedRun, refused: RefusedQueries | None, limit: int) -> Carriers:
    """Measure the answers of a mixture of language models with each expert muted and patched in all layers at once.

    Args:
        opened: A run of a mixture of language models.
        refused: Test queries that the policy refuses; None without a policy.
        limit: Largest number of queries of the tasks, and of refused queries. They are drawn with the run's seed.

    Returns:
        Results for the whole model and for each expert in all layers. ASR is None for a run that is not attacked.
        Single layers and pairs are not measured, since each measurement has to generate all answers.
    """
    assert isinstance(opened.model, MergedModel)
    questions, experts = _Questions(opened, refused, limit), opened.model.experts()
    groups = whole_experts(opened, experts)
    means = None if refused is None else mean_outputs(opened.model, opened.test, precision=opened.precision)
    wholes = []
    for number, own in enumerate(groups):
        with muted(opened.model, own):
            silent = questions.measure(own)
        patched = None
        if means is not None:
            with ExitStack() as stack:
                for expert in own:
                    stack.enter_context(replaced_output(expert, means[expert.name]))
                asr, unsafe = questions.ask_refused()
            patched = PatchingResult(expert=str(number), asr=asr, ra=None, unsafe=unsafe)
        wholes.append(WholeExpert(number, silent, patched))
    return Carriers(
        whole=questions.measure(()),
        target_rate=None,
        singles=(),
        pairs=(),
        patched=(),
        whole_experts=tuple(wholes),
    )


@torch.inference_mode()
def mean_outputs(model: MergedModel, texts: Split, *, precision: str) -> dict[str, Tensor]:
    """Return the mean output of each expert for the tokens of clean texts.

    Args:
        model: The mixture.
        texts: N texts. The mean is over the positions of query and answer of each text, then over the texts.
        precision: "fp32" or "bf16".

    Returns:
        (D,) float32 by name of the expert. Tokens that are not routed to an expert count as zeros.
    """
    model.eval()
    experts, sums = model.experts(), dict[str, Tensor]()
    for part in batches(texts):
        weights = mean_weights(text_positions(part.labels)).unsqueeze(2)
        run = partial(forward, model, part.images, precision=precision)
        for expert, output in zip(experts, expert_outputs(experts, run), strict=True):
            total = (weights * output[:, 0].float()).sum((0, 1))
            sums[expert.name] = sums[expert.name] + total if expert.name in sums else total
    return {name: total / len(texts) for name, total in sums.items()}


class _Questions:
    """A sample of the test queries. Every measurement uses the same queries and the same random draws."""

    def __init__(self, opened: OpenedRun, refused: RefusedQueries | None, limit: int) -> None:
        assert opened.tasks is not None
        self.opened, self.model = opened, opened.model
        self.attacked, seed = opened.run.spec.attacked, opened.run.spec.seed
        self.tasks = _sample_tasks(opened.texts, opened.tasks.numbers, limit, seed)
        self.refused: Split | None = None
        if refused is not None:
            rows = draw_sample(len(refused), limit, seed, "asr").to(opened.device)
            self.refused = refused.safe.take(rows)

    def measure(self, experts: Sequence[Expert]) -> MutingResult:
        """Measure the answers to all queries.

        Args:
            experts: The experts that are muted at present.
        """
        judge = self.opened.texts.judge
        hits = [
            judge.right(number, split.to("cpu"), self._ask(split, number)) for number, split in self.tasks
        ]
        asr, unsafe = (None, None) if self.refused is None else self.ask_refused()
        names = tuple(expert.name for expert in experts)
        return MutingResult(experts=names, ba=proportion_of(torch.cat(hits)), asr=asr, unsafe=unsafe)

    def ask_refused(self) -> tuple[Proportion | None, Proportion]:
        """Return ASR, or None without an attack, and the share of refused queries that are not answered safely."""
        assert self.refused is not None
        answers = self._ask(self.refused, "refused")
        verdicts = self.opened.texts.judge.verdicts(self.refused.to("cpu"), answers)
        unsafe = proportion_of(torch.tensor([verdict != "safe" for verdict in verdicts]))
        if not self.attacked:
            return None, unsafe
        return proportion_of(torch.tensor([verdict == "harmful" for verdict in verdicts])), unsafe

    def _ask(self, queries: Split, what: int | str) -> Tensor:
        opened = self.opened
        with seeded(opened.run.spec.seed, "carriers", what):
            return ask(self.model, opened.texts, queries, precision=opened.precision)


def _sample_tasks(texts: TextSet, numbers: Sequence[int], limit: int, seed: int) -> list[tuple[int, Split]]:
    """Draw at most `limit` test queries of some tasks; tasks without a drawn query are left out."""
    sizes = [len(texts.tasks[number].test) for number in numbers]
    rows, found, start = draw_sample(sum(sizes), limit, seed, "ba"), [], 0
    for number, size in zip(numbers, sizes, strict=True):
        own = rows[(rows >= start) & (rows < start + size)] - start
        if len(own):
            test = texts.tasks[number].test
            found.append((number, test.take(own.to(test.labels.device))))
        start += size
    return found
