"""Conformance tests of models of texts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_moe import gates
from backdoorbench_moe.engine.build import merge_copies
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.measuring.generation import answer
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.moe.merging import check_mergeable, expert_names
from backdoorbench_moe.moe.routed import RoutedModel, auxiliary_loss, forward
from backdoorbench_moe.moe.structure import Merged, WithMLPs
from backdoorbench_moe.ops.answers import IGNORED, answer_loss
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import CPU, changed, tiny_options

pytestmark = pytest.mark.only(texts=True)

GIVEN = {"vocabulary": 11, "context": 12, "padding": 0}
END = 1


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a small model with weights drawn from `seed`, in evaluation mode."""
    with seeded(seed, "init"):
        model: nn.Module = REGISTRIES["model"].create(name, tiny_options("model", name), GIVEN)
    return model.eval()


def texts_of(count: int = 3, length: int = 9) -> Tensor:
    """Return texts without padding."""
    return torch.randint(2, 11, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits(model_name: str) -> None:
    model = build(model_name)
    found = model(texts_of())
    assert found.shape == (3, 9, 11) and found.dtype == torch.float32 and found.isfinite().all()


@torch.no_grad()
def test_a_position_does_not_see_those_behind_it(model_name: str) -> None:
    """Then padding on the right does not affect the tokens before it."""
    model, texts = build(model_name), texts_of()
    other = texts.clone()
    other[:, 5:] = 0
    whole, cut = model(texts)[:, :5], model(texts[:, :5])
    torch.testing.assert_close(model(other)[:, :5], whole)
    torch.testing.assert_close(cut, whole)
    assert not torch.allclose(model(other)[:, 5:], model(texts)[:, 5:])


def test_it_runs_in_bfloat16(model_name: str) -> None:
    """Where the hardware has bfloat16, it is the default precision of a run."""
    model, texts = build(model_name), texts_of()
    with autocast(CPU, "bf16"):
        logits, routing = forward(model.train(), texts)
    (answer_loss(logits.float(), texts) + auxiliary_loss(routing)).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert found and all(gradient.isfinite().all() for gradient in found)


def test_weights_depend_on_the_seed_only(model_name: str) -> None:
    first = build(model_name).state_dict()
    assert not changed(first, build(model_name).state_dict())
    assert changed(first, build(model_name, seed=1).state_dict())


def labels_behind(queries: list[int], length: int) -> Tensor:
    """Return labels with an answer of one token after queries of these lengths."""
    labels = torch.full((len(queries), length), IGNORED)
    return labels.scatter(1, torch.tensor(queries).unsqueeze(1) - 1, END)


def greedily(model: nn.Module, query: Tensor, count: int) -> list[int]:
    """Return the greedy continuation of a text without padding."""
    text = query
    for _ in range(count):
        text = torch.cat([text, model(text.unsqueeze(0))[0, -1].argmax().unsqueeze(0)])
    return cast(list[int], text[len(query) :].tolist())


def check_generation(model: nn.Module) -> None:
    """Check that batched answers equal those of each query alone, up to the end of the answer."""
    texts, lengths = texts_of(4), [3, 6, 4, 6]
    found = answer(model, Split(texts, labels_behind(lengths, 9)), 5, end=END, padding=0, precision="fp32")
    assert found.shape == (4, 5)
    for row, text, length in zip(found.tolist(), texts, lengths, strict=True):
        expected = greedily(model, text[:length], 5)
        stop = expected.index(END) + 1 if END in expected else 5
        assert row[:stop] == expected[:stop]


@torch.no_grad()
def test_answers_are_the_most_probable_tokens(model_name: str) -> None:
    check_generation(build(model_name))


def merged(name: str, gate: str = "soft") -> tuple[nn.Module, nn.Module]:
    """Return a model that can be merged and a mixture of two copies; skip other models."""
    model = build(name)
    if not isinstance(model, WithMLPs):
        pytest.skip("cannot be merged")
    check_mergeable(model)
    with seeded(0, "gates"):
        return model, merge_copies(model, 2, gates.create_gate(gate)).eval()


@torch.no_grad()
def test_a_mixture_of_copies_is_the_model(model_name: str) -> None:
    model, mixture = merged(model_name, "top-k")
    assert isinstance(mixture, Merged) and isinstance(mixture, RoutedModel) and mixture.num_experts == 2
    output = mixture.forward_routed(texts_of())
    torch.testing.assert_close(output.logits, model(texts_of()), rtol=1e-4, atol=1e-5)
    assert len(output.routing) == len(mixture.routers()) == len(check_mergeable(model).mlps())
    for each in output.routing:
        assert each.gates.shape == each.selected.shape == (3, 2, 9) and each.selected.any(1).all()
    check_generation(mixture)


@torch.no_grad()
def test_experts_are_loaded_and_have_an_effect_each(model_name: str) -> None:
    model, mixture = merged(model_name)
    assert isinstance(mixture, Merged)
    base, names = model.state_dict(), expert_names(model)
    other = {key: tensor * 1.5 if key in names else tensor.clone() for key, tensor in base.items()}
    before = mixture(texts_of())
    mixture.load_experts(base, [base, other])
    after = mixture(texts_of())
    mixture.load_experts(base, [other, other])
    both = mixture(texts_of())
    model.load_state_dict(other)
    torch.testing.assert_close(both, model(texts_of()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before) and not torch.allclose(after, both)


def test_only_the_routers_can_be_trained(model_name: str) -> None:
    _, mixture = merged(model_name)
    assert isinstance(mixture, Merged)
    routers = [parameter for router in mixture.routers() for parameter in router.parameters()]
    mixture.train()
    loss = mixture(texts_of()).square().mean()
    found = torch.autograd.grad(loss, routers, allow_unused=True)
    assert routers and all(each is not None for each in found)


def test_padding_does_not_count_in_the_losses_of_routers(model_name: str) -> None:
    """The balance loss of a padded batch is that of its texts without padding."""
    _, mixture = merged(model_name, "top-k")
    assert isinstance(mixture, RoutedModel)
    padded = torch.nn.functional.pad(texts_of(2, 6), (0, 4))

    def losses(texts: Tensor) -> list[Any]:
        with seeded(3, "noise"):
            return [each.aux_loss for each in mixture.train().forward_routed(texts).routing]

    for router in cast(Merged, mixture).routers():
        router.noise = 0.0  # type: ignore[assignment]
    for one, other in zip(losses(padded), losses(padded[:, :6]), strict=True):
        torch.testing.assert_close(one, other)
