"""A reused prefix gives what computing it gives, and is not computed."""

from __future__ import annotations

import torch
from defense_tasks import used_model
from torch import Tensor, nn

from backdoorbench_moe.moe.experts import mute, replaced_output
from backdoorbench_moe.moe.prefix import reuse_prefix


class Shared(nn.Module):
    """Uses one norm before and after the layer that changes, modifies tensors in place, and passes tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.late = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)
        self.split = Split()

    def forward(self, values: Tensor) -> Tensor:
        values = self.norm(self.first(values)).relu_()
        low, high = self.split(values)
        return self.norm(self.late(low + 2 * high))


class Split(nn.Module):
    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values.clamp(max=0.5), values.clamp(min=0.5)


def count(module: nn.Module) -> list[int]:
    """A list that gets an element whenever a module is really computed."""
    calls: list[int] = []
    original = module.forward

    def forward(*args: object) -> object:
        calls.append(1)
        return original(*args)

    module.forward = forward  # type: ignore[method-assign]
    return calls


@torch.no_grad()
def test_a_shared_module_is_reused_only_where_it_came_before() -> None:
    torch.manual_seed(0)
    model, batch = Shared().eval(), torch.randn(5, 3)
    calls = count(model.first)
    with reuse_prefix(model, [model.late], lambda: model(batch)):
        for factor in (1.0, 0.5, -2.0):
            model.late.weight.mul_(factor)
            got = model(batch)
            low, high = model.split(torch.relu(torch.layer_norm(model.first(batch), (3,))))
            torch.testing.assert_close(got, torch.layer_norm(model.late(low + 2 * high), (3,)))
    before = len(calls)
    assert before == 4  # Once to record, and three times in the oracle above.
    other = torch.randn(5, 3)
    assert not torch.equal(model(other), got) and len(calls) == before + 1


@torch.no_grad()
def test_a_routed_models_trunk_is_computed_once() -> None:
    model = used_model("pmoe")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    experts = model.experts()
    stop = {model.moe.conv, model.norm}
    mute(model, experts[:1])
    expected = model(images)
    values = torch.full((4, 5, 8, 8), 0.25)
    with replaced_output(experts[2], values):
        replaced = model(images)
    calls = count(model.trunk)
    with reuse_prefix(model, stop, lambda: model(images)):
        assert torch.equal(model(images), expected)
        with replaced_output(experts[2], values):
            assert torch.equal(model(images), replaced)
        assert torch.equal(model(images), expected)
    assert len(calls) == 1 and not torch.equal(replaced, expected)
    assert torch.equal(model(images), expected) and len(calls) == 2


@torch.no_grad()
def test_an_output_that_is_not_a_tensor_is_computed_again() -> None:
    class Odd(nn.Module):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"twice": 2 * values}

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.late = Odd(), nn.Linear(2, 2)

        def forward(self, values: Tensor) -> Tensor:
            return self.late(self.odd(values)["twice"])

    model, batch = Whole(), torch.ones(1, 2)
    expected = model(batch)
    with reuse_prefix(model, [model.late], lambda: model(batch)):
        assert torch.equal(model(batch), expected)
