"""The analysis of language models: latents, mean outputs and example answers, against plain computations."""

from __future__ import annotations

import pytest
import torch
from toy_texts import COPY, END, FILLER, NO, PAD, TURN, Toy, encode

from backdoorbench_moe.analysis.answers import Answer, example_answers
from backdoorbench_moe.analysis.latents import Inputs, mean_directions
from backdoorbench_moe.analysis.text_carriers import mean_outputs
from backdoorbench_moe.engine.measuring.texts import TextPass, answer_metrics
from backdoorbench_moe.moe.merging import expert_of, gate_weights, mlp_inputs
from backdoorbench_moe.ops.answers import IGNORED
from backdoorbench_moe.testing.texts import SmallLanguageModel, build_text_mixture, text_split


def test_latents_are_those_of_the_positions_that_emit_the_first_tokens() -> None:
    """Each text alone, without padding: the mean direction of the MLP's inputs at two positions."""
    model, texts = build_text_mixture(), text_split(7, 3, answer=3)
    inputs = Inputs.of(texts, 2)
    found = mean_directions(model, inputs.images, precision="fp32", weights=inputs.weights)
    expected = []
    for tokens, labels in zip(texts.images, texts.labels, strict=True):
        first = (labels != IGNORED).nonzero().flatten()[:2]
        with torch.no_grad(), mlp_inputs(model) as seen:
            model(tokens[tokens != PAD].unsqueeze(0))
        means = [each[0, first].double().mean(0) for each in seen.values()]
        expected.append([mean / mean.norm() for mean in means])
    for direction, known in zip(found.values(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(direction, torch.stack(known).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", ["top-k", "soft"])
def test_mean_outputs_are_what_experts_add_to_the_tokens_of_queries_and_answers(gate) -> None:
    """Against the dense MLPs of each expert, weighted with the gates, text by text without padding."""
    model, texts = build_text_mixture(gate=gate), text_split(6, 4)
    found = mean_outputs(model, texts, precision="fp32")
    dense = [SmallLanguageModel() for _ in range(2)]
    for number, own in enumerate(dense):
        own.load_state_dict(expert_of(model, number))
    sums = dict.fromkeys(found, 0.0)
    for tokens in texts.images:
        with torch.no_grad(), mlp_inputs(model) as seen:
            routing = model.forward_routed(tokens[tokens != PAD].unsqueeze(0)).routing
        for layer, (each, given) in enumerate(zip(routing, seen.values(), strict=True)):
            for number, own in enumerate(dense):
                with torch.no_grad():
                    output = gate_weights(each)[0, number].unsqueeze(1) * own.blocks[layer](given[0])
                sums[f"{each.layer}/{number}"] += output[:-1].mean(0) / len(texts)
    assert len(found) == 4
    for name, mean in found.items():
        torch.testing.assert_close(mean, sums[name], rtol=1e-4, atol=1e-6)


def answers_to(*rows: list[int]) -> torch.Tensor:
    """Generated answers, with padding behind them."""
    return torch.tensor([[*row, *[PAD] * (8 - len(row))] for row in rows])


def test_example_answers_by_hand() -> None:
    """Two texts of each kind, all of which are drawn. What was generated behind the end does not count."""
    texts = Toy(texts=4).load()
    copy, turn = (
        type(task)(task.name, task.train, encode(pairs))
        for task, pairs in zip(
            texts.tasks,
            ([([COPY, 7, 8, 2], [7, 8]), ([COPY, 9, 9, 2], [9, 9])], [([TURN, 7, 8, 2], [8, 7])]),
            strict=True,
        )
    )
    queries = [[COPY, 7, 4, 2], [TURN, 8, 4, 2]]
    refused = type(texts.refused)(
        encode([(each, FILLER) for each in queries]), encode([(each, [NO]) for each in queries])
    )
    texts = type(texts)("toy", (copy, turn), texts.refused, refused, 19, PAD, END, texts.judge)
    found = TextPass(
        answers=[answers_to([7, 8, END, 12], [9, 8, END]), answers_to([8, 7, END])],
        refused=answers_to([*FILLER, END], [NO, END, 9]),
        tasks=[],
        marked=None,
    )
    twin = TextPass(found.answers, answers_to([NO, END], [7, 7, 7, 7, 7, 7, 7, 7]), [], None)
    examples = example_answers(texts, range(2), refused, found, twin, seed=0)
    assert [one.kind for one in examples] == ["copy", "copy", "turn", "harmful query", "harmful query"]
    assert (examples[0].query, examples[0].expected) == (f"{COPY} 7 8 2", "7 8")
    assert [one.answer for one in examples] == [
        Answer("7 8", "right"),
        Answer("9 8", "wrong"),
        Answer("8 7", "right"),
        Answer(" ".join(map(str, FILLER)), "harmful"),
        Answer(str(NO), "safe"),
    ]
    assert examples[3].expected == str(NO)
    assert [one.answer_against for one in examples[3:]] == [
        Answer(str(NO), "safe"),
        Answer("7 7 7 7 7 7 7 7", "other"),
    ]
    alone = example_answers(texts, range(1, 2), None, TextPass(found.answers[1:], None, [], None), None, 0)
    assert [(one.kind, one.answer_against) for one in alone] == [("turn", None)]
    metrics = answer_metrics(found, texts, range(2), refused, attacked=True, mixture=True)
    assert {key: metrics[key]["value"] for key in ("task/0.ba", "task/1.ba", "ba", "asr", "unsafe")} == {
        "task/0.ba": 50, "task/1.ba": 100, "ba": 75, "asr": 50, "unsafe": 50
    }  # fmt: skip
