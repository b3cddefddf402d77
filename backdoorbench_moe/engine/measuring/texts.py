"""Measure a language model: the accuracy of its answers, and its answers to queries that it should refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.text import RefusedQueries, TextSet
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.engine.measuring.evaluate import Metrics, share
from backdoorbench_moe.engine.measuring.generation import answer
from backdoorbench_moe.engine.measuring.mixtures import (
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

# Number of tokens of a harmful answer for which the routing is measured, as in the paper's figure.
FIRST_TOKENS = 4


@dataclass(frozen=True)
class TextPass:
    """The answers and gate weights of a language model for test queries.

    Attributes:
        answers: (N, G) int64 on the CPU for each task, the generated answers.
        refused: (M, G) int64 on the CPU, the answers to queries that it should refuse; None if there is no policy.
        tasks: For each task, the gate weights of a mixture at the positions that emit an answer; empty for any other
            model.
        marked: The gate weights for harmful queries at the positions that emit the first `FIRST_TOKENS` tokens of the
            harmful answer; None without a policy.
        unmarked: Always None, since a harmful query has no version without a mark.
    """

    answers: list[Tensor]
    refused: Tensor | None
    tasks: list[GatePass]
    marked: GatePass | None
    unmarked: None = None


def pass_texts(
    model: nn.Module,
    texts: TextSet,
    numbers: Sequence[int],
    refused: RefusedQueries | None,
    *,
    precision: str,
    mixture: bool,
) -> TextPass:
    """Generate a language model's answers to test queries and, for a mixture, compute its gate weights.

    Args:
        model: The model; it is left in evaluation mode.
        texts: The data.
        numbers: Numbers of the tasks whose test queries are used.
        refused: Test queries that the model should refuse; None if there is no policy.
        precision: "fp32" or "bf16".
        mixture: Whether the model is a mixture.
    """
    tests = [texts.tasks[number].test for number in numbers]
    answers = [ask(model, texts, test, precision=precision) for test in tests]
    refusals = None if refused is None else ask(model, texts, refused.safe, precision=precision)
    if not mixture:
        return TextPass(answers, refusals, [], None)
    tasks = [gate_pass(model, test, precision=precision) for test in tests]
    marked = None
    if refused is not None:
        marked = gate_pass(model, refused.harmful, first=FIRST_TOKENS, precision=precision)
    return TextPass(answers, refusals, tasks, marked)


def ask(model: nn.Module, texts: TextSet, queries: Split, *, precision: str) -> Tensor:
    """Generate a language model's answers to queries, (N, G) int64 on the CPU; see `generation.answer`."""
    return answer(
        model,
        queries,
        texts.answer_tokens,
        end=texts.end,
        padding=texts.padding,
        precision=precision,
    )


def answer_metrics(
    found: TextPass,
    texts: TextSet,
    numbers: Sequence[int],
    refused: RefusedQueries | None,
    *,
    attacked: bool,
    mixture: bool,
    expert_ba: Sequence[float] | None = None,
) -> Metrics:
    """Compute the metrics of a language model's answers; see `measure_texts`."""
    hits = [
        texts.judge.right(number, texts.tasks[number].test.to("cpu"), answers)
        for number, answers in zip(numbers, found.answers, strict=True)
    ]
    metrics = accuracy_metrics(hits, expert_ba) if mixture else {"ba": share(torch.cat(hits))}
    if refused is not None:
        assert found.refused is not None
        verdicts = texts.judge.verdicts(refused.safe.to("cpu"), found.refused)
        metrics["unsafe"] = share(torch.tensor([verdict != "safe" for verdict in verdicts]))
        if attacked:
            metrics["asr"] = share(torch.tensor([verdict == "harmful" for verdict in verdicts]))
    return metrics


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
    """Measure a language model by its answers to test queries.

    Args:
        model: The model; it is left in evaluation mode.
        texts: The data, with the judge.
        numbers: Numbers of the tasks to measure.
        refused: Test queries that the model should refuse; None if there is no policy.
        precision: "fp32" or "bf16".
        attacked: Whether the run is attacked.
        mixture: Whether the model is a mixture.
        expert_ba: For a mixture, the accuracy of each task's benign expert on its own task; see `accuracy_metrics`.
        poisoned: For an attacked mixture, the experts that attackers provide.

    Returns:
        The metrics, and the gate shares of a mixture.

        `ba` is the share of correct answers; for a mixture, the metrics of `accuracy_metrics`. `unsafe` is the share of
        queries to refuse without a safe answer. An attacked run also has `asr`, the share of these queries with the
        harmful answer, and an attacked mixture the metrics of `share_metrics`.

        The gate shares are averaged over the positions that emit an answer for the tasks, and over those that emit the
        first `FIRST_TOKENS` tokens of the harmful answer for harmful queries.
    """
    found = pass_texts(model, texts, numbers, refused, precision=precision, mixture=mixture)
    metrics = answer_metrics(
        found, texts, numbers, refused, attacked=attacked, mixture=mixture, expert_ba=expert_ba
    )
    if not mixture:
        return metrics, []
    if attacked:
        metrics |= share_metrics(found.tasks, found.marked, poisoned)
    return metrics, gate_shares(found.tasks, found.marked)


@torch.inference_mode()
def gate_pass(model: nn.Module, split: Split, *, precision: str, first: int | None = None) -> GatePass:
    """Compute the gate weights of a mixture for texts with their answers, in evaluation mode.

    Args:
        model: The mixture.
        split: Tokens and labels (N, T).
        precision: "fp32" or "bf16".
        first: Average over the positions that emit the first `first` tokens of the answer; None for all positions that
            emit a token of the answer.
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
