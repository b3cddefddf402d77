"""The gates that choose the largest logits, worked out by hand: `top-k`, `soft` and `hidden`."""

from __future__ import annotations

import math

import pytest
import torch
from gate_tables import GATES, MEAN_GATES, ODDS, pass_through, table_of
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.errors import ConfigError, PluginError, ShapeError
from backdoorbench_moe.gates import create_gate
from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.gates.hidden import contrast
from backdoorbench_moe.moe.layers import TopKSoftmaxRouter

# The two largest odds of each row, divided by their sums 6, 9 and 7.
TOP_2 = torch.tensor([[4 / 6, 2 / 6, 0], [0, 3 / 9, 6 / 9], [2 / 7, 5 / 7, 0]])
# Over the common denominator 21, the columns of TOP_2 sum to 20, 29 and 14. Their means:
MEAN_TOP_2 = (20 / 63, 29 / 63, 14 / 63)


def test_top_2_by_hand() -> None:
    router = pass_through(create_gate("top-k")(3, 3)).eval()
    routed = router(ODDS.log()[None])
    torch.testing.assert_close(routed.gates[0], GATES)
    torch.testing.assert_close(table_of(routed), TOP_2)
    assert routed.selected[0].tolist() == [[True, True, False], [False, True, True], [True, True, False]]
    assert routed.aux_loss is None


def test_the_balance_loss_of_top_2_by_hand() -> None:
    """E times the sum of mean weights times mean gates: 3 (20*86 + 29*113 + 14*81) / (63*280) = 1.0427."""
    router = pass_through(create_gate("top-k", balance=0.5, noise=0)(3, 3)).train()
    want = 3 * sum(w * g for w, g in zip(MEAN_TOP_2, MEAN_GATES, strict=True))
    assert want == pytest.approx(18393 / 17640)
    assert router(ODDS.log()[None]).aux_loss.item() == pytest.approx(0.5 * want, rel=1e-6)
    # The model's loss is the mean over the layers, whose losses are added up.
    router = pass_through(create_gate("top-k", balance=0.5, noise=0)(3, 3, layers=4)).train()
    assert router(ODDS.log()[None]).aux_loss.item() == pytest.approx(0.5 * want / 4, rel=1e-6)
    assert pass_through(create_gate("top-k", balance=0)(3, 3)).train()(ODDS.log()[None]).aux_loss is None


def test_the_gradient_of_the_balance_loss_by_hand() -> None:
    """For token t and expert j, with weights w and gates g, mean weights W and mean gates G, and E = 3 tokens:

        dL/dz_tj = w_tj (G_j - sum_i w_ti G_i) + g_tj (W_j - sum_i g_ti W_i)

    For the first token, the sums are (2*86 + 113) / 840 = 95/280 and (4*20 + 2*29 + 14) / 441 = 152/441:

        j = 0: 2/3 (86 - 95)/280 + 4/7 (140 - 152)/441 = -3/140 - 16/1029
        j = 1: 1/3 (113 - 95)/280 + 2/7 (203 - 152)/441 = 3/140 + 34/1029
        j = 2: 0 + 1/7 (98 - 152)/441 = -18/1029
    """
    router = pass_through(create_gate("top-k", balance=1.0, noise=0)(3, 3)).train()
    logits = ODDS.log()[None].requires_grad_()
    router(logits).aux_loss.backward()
    want = torch.tensor([-3 / 140 - 16 / 1029, 3 / 140 + 34 / 1029, -18 / 1029])
    torch.testing.assert_close(logits.grad[0, 0], want)


def test_soft_by_hand() -> None:
    """The weights are the gates, and the balance loss is 3 (86^2 + 113^2 + 81^2) / 280^2."""
    router = pass_through(create_gate("soft", balance=1.0)(3, 3)).train()
    routed = router(ODDS.log()[None])
    torch.testing.assert_close(table_of(routed), GATES)
    assert routed.selected.all()
    assert routed.aux_loss.item() == pytest.approx(3 * (86**2 + 113**2 + 81**2) / 280**2, rel=1e-6)


def test_top_k_of_all_experts_is_soft() -> None:
    routed = pass_through(create_gate("top-k", top_k=3)(3, 3)).eval()(ODDS.log()[None])
    torch.testing.assert_close(table_of(routed), GATES)


def test_hidden_by_hand() -> None:
    """The first state minus the mean (-0.5, -1) of the others is (4.5, 6), of length 7.5; and so on.

    The logits of the token (5, 0) are 3, -3 and 0; of (0, 5): 4, 4 and -5; of (-5, -5): -7, -1 and 5.
    """
    gate = create_gate("hidden")
    router = gate(2, 3).eval()
    gate.set_from_states(router, torch.tensor([[4.0, 5.0], [-2.0, 5.0], [1.0, -7.0]]))
    torch.testing.assert_close(router.weight.detach(), torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, -1.0]]))
    one, two = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-6))
    want = torch.tensor([[one, 0, 1 - one], [0.5, 0.5, 0], [0, 1 - two, two]])
    tokens = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]]])
    torch.testing.assert_close(table_of(router(tokens)), want)
    assert router.train()(tokens).aux_loss is None


@given(st.integers(2, 6), st.integers(1, 8), st.floats(0.1, 10), st.integers(0, 2**31))
def test_contrast_is_the_direction_away_from_the_mean_of_all(experts, features, scale, seed) -> None:
    """s - mean of the others = E / (E - 1) (s - mean of all). So a common offset and the scale have no effect."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(experts, features, generator=generator)
    away = (states - states.mean(0)).double()
    want = away / away.norm(dim=1, keepdim=True)
    clear = away.norm(dim=1) > 1e-2
    offset = torch.randn(features, generator=generator)
    for given_states in (states, scale * states, states + offset):
        found = contrast(given_states)[clear].double()
        torch.testing.assert_close(found, want[clear], atol=1e-3, rtol=1e-3)


def test_equal_states_and_a_single_state_stay_finite() -> None:
    assert not contrast(torch.ones(3, 4)).any()
    torch.testing.assert_close(contrast(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def test_states_of_another_shape_are_refused() -> None:
    gate = create_gate("hidden")
    with pytest.raises(ShapeError, match=r"states: expected \(E, D\) = \(3, 2\), got \(3, 5\)"):
        gate.set_from_states(gate(2, 3), torch.ones(3, 5))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top-k", {"top_k": 0}, "top-k: top_k: expected 1 to E, the number of experts, got 0"),
        ("hidden", {"top_k": -1}, "hidden: top_k: expected 1 to E, the number of experts, got -1"),
        ("top-k", {"top_k": 4}, "top-k: top_k: expected 1 to 3, the number of experts, got 4"),
        ("hidden", {"top_k": 4}, "hidden: top_k: expected 1 to 3, the number of experts, got 4"),
        ("top-k", {"balance": -0.1}, "top-k: balance: expected a finite number of at least 0, got -0.1"),
        ("top-k", {"noise": -1.0}, "top-k: noise: expected a finite number of at least 0, got -1.0"),
        ("top-k", {"init_std": -1.0}, "top-k: init_std: expected a finite number of at least 0, got -1.0"),
        ("soft", {"balance": -1.0}, "soft: balance: expected a finite number of at least 0, got -1.0"),
        ("top-k", {"top_k": 1, "balance": 0.0}, "top-k: balance: expected a number above 0"),
    ],
)
def test_values_out_of_range_are_refused(name, options, message) -> None:
    with pytest.raises(ConfigError) as error:
        create_gate(name, **options)(8, 3)
    assert str(error.value).startswith(message)


class Deep(TopKSoftmaxRouter):
    """A router with a submodule that has the name of the number of routed layers."""

    def __init__(self, features, experts):
        super().__init__(features, experts, top_k=1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(features, features))


class DeepGate(Gate):
    def build(self, features, num_experts):
        return Deep(features, num_experts)


def test_a_router_whose_layers_are_a_module_is_refused() -> None:
    with pytest.raises(
        PluginError, match=r"^gate DeepGate: expected a router whose `layers` is the number of"
    ):
        DeepGate()(8, 3)
