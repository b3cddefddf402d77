"""The gate `sample-top1`, worked out by hand for noise that is given, and the draws by their shares."""

from __future__ import annotations

import math

import pytest
import torch
from gate_tables import GATES, MEAN_GATES, ODDS, pass_through, table_of

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.gates import create_gate
from backdoorbench_moe.moe.layers import SampleTop1Router, merged_routers

# With this noise, by which the odds are multiplied, they are (4, 8, 1), (9, 3, 6) and (2, 5, 1).
NOISE = torch.tensor([[1.0, 4.0, 1.0], [9.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).log()
CHOSEN = torch.tensor([[False, True, False], [True, False, False], [False, True, False]])


@pytest.fixture
def router(monkeypatch) -> SampleTop1Router:
    """A router whose logits are the features of the token, and whose noise is `NOISE`."""
    monkeypatch.setattr(merged_routers, "gumbel_noise", lambda logits: NOISE)
    return pass_through(create_gate("sample-top1", balance=1.0)(3, 3)).train()


def test_the_first_step_by_hand(router) -> None:
    """At temperature 1 the probabilities are the odds divided by their sums: 8/13, 9/18 and 5/8."""
    routed = router(ODDS.log()[None])
    torch.testing.assert_close(table_of(routed), torch.tensor([[0, 8 / 13, 0], [0.5, 0, 0], [0, 5 / 8, 0]]))
    torch.testing.assert_close(routed.gates[0], GATES)
    assert torch.equal(routed.selected[0], CHOSEN)


def test_the_last_temperature_by_hand(router) -> None:
    """At temperature 0.5 the odds are squared: 64/(16+64+1), 81/(81+9+36) and 25/(4+25+1)."""
    router.step.fill_(100)
    routed = router(ODDS.log()[None])
    want = torch.tensor([[0, 64 / 81, 0], [81 / 126, 0, 0], [0, 25 / 30, 0]])
    torch.testing.assert_close(table_of(routed), want)


def test_evaluation_by_hand(router) -> None:
    routed = router.eval()(ODDS.log()[None])
    assert torch.equal(table_of(routed), CHOSEN.float()) and routed.aux_loss is None


def test_the_balance_loss_by_hand(router) -> None:
    """The mean weights are 0.5/3, (8/13 + 5/8)/3 = 43/104, and 0."""
    want = 3 * (0.5 / 3 * MEAN_GATES[0] + 43 / 104 * MEAN_GATES[1])
    assert router(ODDS.log()[None]).aux_loss.item() == pytest.approx(want, rel=1e-6)


def test_the_gradient_of_the_weight_by_hand(router) -> None:
    """Of the softmax p = (4, 8, 1) / 13: p_1 (1 - p_1) for the chosen logit, -p_1 p_j for the others."""
    logits = ODDS.log()[None].requires_grad_()
    table_of(router(logits))[0].sum().backward()
    want = torch.tensor([-8 * 4, 8 * 5, -8 * 1]) / 13**2
    torch.testing.assert_close(logits.grad[0, 0], want)
    assert not logits.grad[0, 1:].any()


def test_a_masked_expert_has_no_part_in_the_probability(router) -> None:
    """Without expert 1 the odds are (4, 1), (9, 6) and (2, 1); at temperature 0.5 they are squared."""
    router.step.fill_(100)
    router.masked[1] = True
    want = torch.tensor([[16 / 17, 0, 0], [81 / 117, 0, 0], [4 / 5, 0, 0]])
    torch.testing.assert_close(table_of(router(ODDS.log()[None])), want)


@pytest.mark.parametrize(
    ("step", "temperature"),
    [(0, 1.0), (1, 0.990050), (50, 0.606531), (69, 0.501576), (70, 0.5), (1_000_000, 0.5)],
)
def test_the_schedule_by_hand(step, temperature) -> None:
    """max(0.5, exp(-0.01 step)): exp(-0.69) = 0.501576, exp(-0.7) = 0.496585."""
    router = create_gate("sample-top1")(3, 3)
    router.step.fill_(step)
    assert router.temperature.item() == pytest.approx(temperature, abs=1e-6)


def test_the_schedule_has_options() -> None:
    router = create_gate("sample-top1", decay=0.1, min_temperature=0.25)(3, 3)
    router.step.fill_(10)
    assert router.temperature.item() == pytest.approx(math.exp(-1), abs=1e-6)
    router.step.fill_(20)
    assert router.temperature.item() == 0.25


def test_only_passes_in_training_are_counted_and_the_count_is_saved() -> None:
    router = create_gate("sample-top1")(3, 3)
    for passes in (1, 2, 3):
        router.train()(ODDS.log()[None])
        router.eval()(ODDS.log()[None])
        assert router.step.item() == passes
    other = create_gate("sample-top1")(3, 3)
    other.load_state_dict(router.state_dict())
    assert other.step.item() == 3


@pytest.mark.parametrize("training", [True, False])
def test_experts_are_drawn_with_the_probability_of_their_gates(training) -> None:
    """Also at the smallest temperature, which only changes the weight. The standard error is below 0.003."""
    torch.manual_seed(0)
    router = pass_through(create_gate("sample-top1")(3, 3)).train(training)
    router.step.fill_(100)
    routed = router(ODDS.log()[:, None].expand(3, 30_000, 3))
    torch.testing.assert_close(routed.selected.float().mean(1), GATES, atol=0.012, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.5, -1.0])
def test_a_temperature_out_of_range_is_refused(value) -> None:
    with pytest.raises(ConfigError, match=r"sample-top1: min_temperature: expected a number in \(0, 1\]"):
        create_gate("sample-top1", min_temperature=value)
