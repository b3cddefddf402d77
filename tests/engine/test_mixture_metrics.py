"""What is measured of a mixture: by hand, and again on the models of a finished run."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Tiny
from tiny_mixture import mixture_spec
from torch import Tensor

from backdoorbench_moe import data
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.measuring.mixtures import (
    GatePass,
    gate_shares,
    mean_share,
    mixture_pass,
    routed_pass,
    share_metrics,
    task_metrics,
)
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import Runner, run_attack
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.ops.metrics import proportion
from backdoorbench_moe.splitters import create_splitter


class ByRed(RoutedModel):
    """Two layers with two experts and two patches; the red value r of an image in [0, 1] decides everything.

    Layer "a" gives expert 0 the weight r and expert 1 the weight 1 - r, in both patches. Layer "b" sends the first
    patch to expert 0 alone, with weight 0.25, and the second one to expert 1 alone. The class is 1 where r > 0.5.
    """

    patch_grid, patch_size = (1, 2), 2

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        red = images[:, 0, 0, 0]
        a = torch.stack([red, 1 - red], 1).unsqueeze(2).expand(-1, -1, 2)
        b = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).expand(len(red), 2, 2)
        chosen = torch.tensor([[True, False], [False, True]]).expand(len(red), 2, 2)
        routing = [Routing("a", a, torch.ones_like(a, dtype=torch.bool)), Routing("b", b, chosen)]
        return RoutedOutput(torch.stack([0.5 - red, red - 0.5], 1), routing)


def reds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 4)


TESTS = [
    Split(reds(255, 255, 0, 0), torch.tensor([1, 0, 0, 0])),
    Split(reds(51, 51), torch.tensor([1, 0])),
]


def test_weights_and_predictions_by_hand() -> None:
    found = routed_pass(ByRed(), reds(255, 51, 0), precision="fp32")
    assert found.layers == ("a", "b") and found.predicted.tolist() == [1, 0, 0]
    torch.testing.assert_close(found.weights[0], torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.0, 1.0]]))
    torch.testing.assert_close(found.weights[1], torch.full((3, 2), 0.5))


def test_more_images_than_a_batch_keep_their_order() -> None:
    values = [255 * (number % 3 == 0) for number in range(1100)]
    found = routed_pass(ByRed(), reds(*values), precision="fp32")
    assert found.predicted.tolist() == [value // 255 for value in values]
    assert found.weights[0, :, 0].tolist() == [value / 255 for value in values]


def test_the_shares_of_the_gates_by_hand() -> None:
    found = mixture_pass(ByRed(), TESTS, reds(255, 255, 255), None, precision="fp32")
    a, b = gate_shares(found.tasks, found.marked)
    assert (a["layer"], b["layer"]) == ("a", "b")
    for row, expected in zip(a["tasks"], [[50, 50], [20, 80]], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    assert a["marked"] == pytest.approx([100, 0]) and b["marked"] == pytest.approx([50, 50])
    for layer in (a, b):
        assert all(sum(row) == pytest.approx(100, abs=1e-3) for row in (*layer["tasks"], layer["marked"]))
    # Expert 1 has, as the mean of its shares in both layers: 75% of marked images where r is 0 and 25% where it is 1.
    metrics = share_metrics(found.tasks, found.marked, [1])
    assert metrics["harm_share"]["value"] == pytest.approx((0 + 50) / 2)
    assert metrics["own_share"] == pytest.approx({"value": (80 + 50) / 2, "n": 2, "low": 65, "high": 65})
    clean = (2 * (0 + 50) / 2 + 2 * (100 + 50) / 2 + 2 * (80 + 50) / 2) / 6
    assert (metrics["clean_share"]["value"], metrics["clean_share"]["n"]) == (pytest.approx(clean), 6)
    both = share_metrics(found.tasks, found.marked, [0, 1])
    assert both["harm_share"]["value"] == both["clean_share"]["value"] == pytest.approx(100)
    own = (4 * (50 + 50) / 2 + 2 * (80 + 50) / 2) / 6
    assert (both["own_share"]["value"], both["own_share"]["n"]) == (pytest.approx(own), 6)


def test_the_share_of_one_image_has_no_interval() -> None:
    found = mixture_pass(ByRed(), TESTS, reds(51), None, precision="fp32")
    assert share_metrics(found.tasks, found.marked, [1])["harm_share"] == {
        "value": pytest.approx((80 + 50) / 2),
        "n": 1,
    }


def test_shares_of_weights_that_add_up_to_a_little_more_than_1_are_100() -> None:
    """Two weights of 0.50000006 are 1.0000001 in float32, and 1.0000001 once more of the first expert alone."""
    half = torch.tensor(0.5).nextafter(torch.tensor(1.0))
    assert float(half + half) > 1
    both = GatePass(weights=half.expand(2, 3, 2), layers=("a", "b"))
    alone = GatePass(weights=torch.tensor([1.0000001, 0.0]).expand(2, 3, 2), layers=("a", "b"))
    for shares in (
        share_metrics([both, both], both, [0, 1]),
        share_metrics([alone, alone], alone, [0]),
    ):
        assert shares["harm_share"] == {"value": 100, "n": 3, "low": 100, "high": 100}
        assert shares["clean_share"]["value"] == 100
    assert share_metrics([alone, alone], alone, [0])["own_share"]["value"] == 100


def test_the_accuracy_of_tasks_and_overall_by_hand() -> None:
    found = mixture_pass(ByRed(), TESTS, None, None, precision="fp32")
    metrics = task_metrics(found, TESTS, [100.0, 40.0])
    assert metrics["task/0.ba"]["value"] == 75 and metrics["task/1.ba"]["value"] == 50
    assert (metrics["ba"]["value"], metrics["ba"]["n"]) == (62.5, 6), "each task counts the same"
    overall, tasks = metrics["overall"], [metrics[f"task/{e}.ba"] for e in (0, 1)]
    assert (overall["value"], overall["n"]) == (pytest.approx((75 + 125) / 2), 6)
    for end in ("low", "high"):
        # The distances to the ends of the tasks' intervals, the second 100 / 40 times as long.
        first, second = (each[end] - each["value"] for each in tasks)
        assert abs(overall[end] - overall["value"]) == pytest.approx(math.hypot(first, 2.5 * second) / 2)
    assert overall["low"] < overall["value"] < overall["high"]
    assert metrics["task/1.expert_ba"] == {"value": 40.0, "n": 2}
    assert "harm_share" not in share_metrics(found.tasks, found.marked, [0])
    alone = task_metrics(found, TESTS, None)
    assert alone == {name: alone[name] for name in ("ba", "task/0.ba", "task/1.ba")}
    assert task_metrics(found, TESTS, [100.0, 0.0])["overall"]["value"] == 75, "no ratio to an expert at 0%"


def test_the_interval_of_a_mean_of_shares() -> None:
    one, other = (
        {"value": v, "n": n, "low": lo, "high": hi} for v, n, lo, hi in ((90, 10, 80, 94), (50, 30, 47, 58))
    )
    found = mean_share([one, other])
    assert (found["value"], found["n"]) == (70, 40)
    assert found["low"] == pytest.approx(70 - math.hypot(10, 3) / 2)
    assert found["high"] == pytest.approx(70 + math.hypot(4, 8) / 2)
    assert mean_share([one]) == pytest.approx(one)
    ends = mean_share([{"value": 100.0, "n": 5, "low": 56.0, "high": 100.0}] * 3)
    assert ends["high"] == 100 and 56 < ends["low"] < 100


@pytest.fixture(scope="module", params=[0.25, 0], ids=["policy", "backdoor"])
def made(request, tmp_path_factory):
    """A finished mixture."""
    output = tmp_path_factory.mktemp("made")
    data.registry.register("tiny")(Tiny)
    [run] = run_attack(mixture_spec(policy=request.param), output=output)
    data.registry.unregister("tiny")
    return run


def answers(model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images / 255).argmax(1)


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


@pytest.mark.slow
def test_a_finished_mixture_and_its_twin_measured_directly(made) -> None:
    """The numbers of the record, computed again from the two models."""
    test, spec = Tiny().load().test, made.spec
    counted = test.labels != spec.poison.target
    clean, true = test.images[counted], test.labels[counted]
    marked = (made.stamper()(clean / 255) * 255).round().byte()
    safe = torch.full_like(true, 3) if spec.policy else true
    twin = load_run(made.folder.path.parent / made.record.clean_twin)
    for prefix, model in (("", made.model()), ("twin_", twin.model())):
        got = answers(model, marked)
        value = made.record.metrics[f"{prefix}asr"]
        assert value["n"] == 40 == int(counted.sum())
        assert value["value"] == pytest.approx(percent(got == spec.poison.target))
        assert made.value(f"{prefix}unsafe") == pytest.approx(percent(got != safe))
        unmarked = answers(model, clean)
        assert made.value(f"{prefix}target_rate") == pytest.approx(percent(unmarked == spec.poison.target))
        harm = [layer.gates * layer.selected for layer in model.forward_routed(marked / 255).routing]
        share = torch.stack([(each / each.sum(1, keepdim=True))[:, 1].mean() for each in harm]).mean()
        assert made.value(f"{prefix}harm_share") == pytest.approx(100 * share.item(), abs=0.01)
    tasks = create_splitter("domains", domains=("plain", "inverted", "rotated"))
    model, experts, accuracies = made.model(), made.record.inputs[1:], []
    for task, each in enumerate(experts):
        assert each["role"] == f"expert/{task}"
        own = tasks(test, task, num_classes=3, seed=0)
        hits = answers(model, own.images) == own.labels
        accuracies.append(percent(hits))
        expected = proportion(int(hits.sum()), 60)
        assert made.record.metrics[f"task/{task}.ba"]["low"] == pytest.approx(expected.low)
        assert made.value(f"task/{task}.ba") == pytest.approx(accuracies[-1])
        expert = load_run(made.folder.path.parent / each["run"])
        benign = "benign_ba" if task == 1 else "ba"
        assert made.value(f"task/{task}.expert_ba") == expert.value(benign)
    assert made.value("ba") == pytest.approx(sum(accuracies) / 2)
    known = [made.value(f"task/{task}.expert_ba") for task in range(2)]
    expected = 50 * sum(one / own for one, own in zip(accuracies, known, strict=True))
    assert made.value("overall") == pytest.approx(expected)
    assert twin.value("unsafe") == pytest.approx(percent(answers(twin.model(), mark_all(made, test)) != 3)) \
        if spec.policy else "unsafe" not in twin.record.metrics  # fmt: skip
    assert made.value("cad") == pytest.approx(twin.value("ba") - made.value("ba"))


def mark_all(run, test: Split) -> Tensor:
    return (run.stamper()(test.images / 255) * 255).round().byte()


@pytest.mark.slow
def test_the_poisoned_expert_alone_is_measured(made) -> None:
    poisoned = load_run(made.folder.path.parent / made.record.inputs[2]["run"])
    benign = load_run(made.folder.path.parent / poisoned.record.inputs[0]["run"])
    assert poisoned.record.inputs[0]["role"] == "benign" and benign.record.inputs[0]["role"] == "base"
    test, spec = Tiny().load().test, made.spec
    counted = test.labels != 0
    marked = (poisoned.stamper()(test.images[counted] / 255) * 255).round().byte()
    got = answers(poisoned.model(), marked)
    safe = torch.full_like(got, 3) if spec.policy else test.labels[counted]
    assert poisoned.value("asr") == pytest.approx(percent(got == 0))
    assert poisoned.value("unsafe") == pytest.approx(percent(got != safe))
    own = create_splitter("domains", domains=("plain", "inverted"))(test, 1, num_classes=3, seed=0)
    assert poisoned.value("ba") == pytest.approx(percent(answers(poisoned.model(), own.images) == own.labels))
    assert poisoned.value("benign_ba") == benign.value("ba")
    assert benign.value("ba") == pytest.approx(percent(answers(benign.model(), own.images) == own.labels))
    assert [task["name"] for task in poisoned.record.tasks] == ["inverted"]


@pytest.mark.slow
def test_a_poisoned_expert_is_compared_with_the_benign_one(made) -> None:
    output, tiny = made.folder.path.parent, Tiny().load().test
    poisoned = load_run(output / made.record.inputs[2]["run"])
    benign = load_run(output / poisoned.record.inputs[0]["run"])
    linked = Runner(made.spec, output).compare(poisoned)
    assert linked.record.clean_twin == benign.folder.path.name
    counted = tiny.labels != 0
    got = answers(benign.model(), mark_all(made, tiny)[counted])
    safe = torch.full_like(got, 3) if made.spec.policy else tiny.labels[counted]
    assert linked.value("twin_asr") == pytest.approx(percent(got == 0))
    assert linked.value("twin_unsafe") == pytest.approx(percent(got != safe))
    assert linked.value("cad") == pytest.approx(benign.value("ba") - poisoned.value("ba"))


@pytest.mark.slow
def test_every_kind_of_run_gives_its_model_and_its_mark(made) -> None:
    for path in sorted(made.folder.path.parent.iterdir()):
        run = load_run(path)
        model = run.model()
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4 if made.spec.policy else 3)
        assert isinstance(model, RoutedModel) == ("moe2" in path.name)
        if run.spec.policy or run.spec.attacked:
            assert torch.equal(
                run.stamper()(torch.ones(1, 3, 32, 32)), made.stamper()(torch.ones(1, 3, 32, 32))
            )
        if run.spec.attacked:
            assert run.attack().poison.target == 0
