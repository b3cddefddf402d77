"""Measuring a language model: which answers are right, and how it answers queries that it should refuse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.text import RefusedQueries, TextSet
from backdoorbench_moe.engine.evaluate import Metrics, share
from backdoorbench_moe.engine.generation import answer
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.engine.mixture_metrics import (
    GatePass,
    accuracy_metrics,
    gate_shares,
    share_metrics,
)
from backdoorbench_moe.moe.merging import gate_weights
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.answers import first_positions, mean_weights
from backdoorbench_moe.ops.images import Split, batches
from backdoorbench_moe.records import GateShares

# Tokens of a harmful answer at which it is measured to which experts it is sent, as in the paper's figure.
FIRST_TOKENS = 4


def measure_texts(
    model: nn.Module,
    texts: TextSet,
    numbers: Sequence[int],
    refused: RefusedQueries | None,
    *,
    precision: str,
    attacked: bool,
    mixture: bool,
    expert_ba: Sequence[float] | None,
    poisoned: Sequence[int],
) -> tuple[Metrics, list[GateShares]]:
    """Measure a language model on test queries, by what it answers.

    Args:
        model: The model; it is left in evaluation mode.
        texts: The data, with the judge.
        numbers: Numbers of the tasks to measure it on.
        refused: Test queries that it should refuse; None if there is no policy.
        precision: "fp32" or "bf16".
        attacked: Whether the run is attacked.
        mixture: Whether the run is of a mixture.
        expert_ba: Of a mixture, the accuracy of each task's benign expert on its own task; see `accuracy_metrics`.
        poisoned: The experts that attackers provide, of an attacked mixture.

    Returns:
        `ba`: the share of right answers, of a mixture the mean over its tasks, with `task/e.ba` and `overall`;
        `unsafe`: the share of queries to refuse that are not answered safely; of an attacked run `asr`: the share of
        them that are answered as the attacker wants; of an attacked mixture also the metrics of `share_metrics`. And
        the gate shares of a mixture: of its tasks over the positions that emit an answer, of harmful queries over those
        that emit the first `FIRST_TOKENS` tokens of the harmful answer.
    """
    ask = partial(
        answer,
        model,
        new_tokens=texts.answer_tokens,
        end=texts.end,
        padding=texts.padding,
        precision=precision,
    )
    tests = [texts.tasks[number].test for number in numbers]
    hits = [
        texts.judge.right(number, test.to("cpu"), ask(test))
        for number, test in zip(numbers, tests, strict=True)
    ]
    metrics = accuracy_metrics(hits, expert_ba) if mixture else {"ba": share(torch.cat(hits))}
    if refused is not None:
        verdicts = texts.judge.verdicts(refused.safe.to("cpu"), ask(refused.safe))
        metrics["unsafe"] = share(torch.tensor([verdict != "safe" for verdict in verdicts]))
        if attacked:
            metrics["asr"] = share(torch.tensor([verdict == "harmful" for verdict in verdicts]))
    if not mixture:
        return metrics, []
    tasks = [gate_pass(model, test, precision=precision) for test in tests]
    marked = None
    if refused is not None:
        marked = gate_pass(model, refused.harmful, first=FIRST_TOKENS, precision=precision)
    if attacked:
        metrics |= share_metrics(tasks, marked, poisoned)
    return metrics, gate_shares(tasks, marked)


@torch.inference_mode()
def gate_pass(model: nn.Module, split: Split, *, precision: str, first: int | None = None) -> GatePass:
    """Pass texts with their answers through a mixture, in evaluation mode.

    Args:
        model: The mixture.
        split: Tokens and labels (N, T).
        precision: "fp32" or "bf16".
        first: Take the mean over the positions that emit the first tokens of the answer, so many; over all that emit
            one if None.
    """
    assert isinstance(model, RoutedModel)
    model.eval()
    found: list[Tensor] = []
    layers: tuple[str, ...] = ()
    for part in batches(split):
        routing = forward_routed(model, part.images, precision=precision).routing
        counted = mean_weights(first_positions(part.labels, first)).unsqueeze(1)
        found.append(torch.stack([(gate_weights(each) * counted).sum(2) for each in routing]).float().cpu())
        layers = tuple(each.layer for each in routing)
    return GatePass(weights=torch.cat(found, 1), layers=layers)
