"""The stacked weights of experts: how they start, and how they are split."""

from __future__ import annotations

import pytest
import torch
from moe_parts import EXPERTS, HIDDEN, make_experts, make_mlp, make_tokens, stack


def test_drawn_experts_differ_and_copies_do_not():
    drawn, copied = stack(make_mlp(), 3, copies=False), stack(make_mlp(), 3, copies=True)
    assert not torch.equal(drawn.fc1.weights[0], drawn.fc1.weights[1])
    assert all(torch.equal(weight, make_mlp().fc2.weight) for weight in copied.fc2.weights)
    assert drawn.fc2.weight.std().item() == pytest.approx(0.02, rel=0.15) and not drawn.fc1.bias.any()


def test_a_batch_of_tokens_for_each_expert_gives_what_its_own_mlp_gives():
    """Each expert's rows put into a dense MLP."""
    experts, tokens = make_experts(3), make_tokens()
    outputs = experts(tokens)
    for e in range(3):
        mlp = make_mlp()
        with torch.no_grad():
            mlp.fc1.weight.copy_(experts.fc1.weight[e * HIDDEN : (e + 1) * HIDDEN])
            mlp.fc1.bias.copy_(experts.fc1.bias[e * HIDDEN : (e + 1) * HIDDEN])
            mlp.fc2.weight.copy_(experts.fc2.weight[e * 8 : (e + 1) * 8])
            mlp.fc2.bias.copy_(experts.fc2.bias[e * 8 : (e + 1) * 8])
        torch.testing.assert_close(outputs[e], mlp(tokens[e]))


def test_dropout_comes_behind_the_activation_and_behind_the_second_layer():
    mlp, seen = make_mlp(), []

    class Spy(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            seen.append((self.name, values.shape[-1]))
            return torch.zeros_like(values)

    experts = type(make_experts())(
        mlp.fc1, mlp.act, mlp.fc2, num_experts=2, copies=True, drop1=Spy("first"), drop2=Spy("second")
    )
    assert not experts(make_tokens(2)).any()
    assert seen == [("first", HIDDEN), ("second", 8)]


def test_channel_groups_are_the_rows_of_the_first_layer():
    experts = make_experts()
    groups = experts.channel_groups()
    assert [(g.start, g.stop) for g in groups] == [(e * HIDDEN, (e + 1) * HIDDEN) for e in range(EXPERTS)]
    assert all(group.layer is experts.fc1 and group.tap is experts.hidden for group in groups)
