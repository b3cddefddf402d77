"""SCALE-UP, IBD-PSC and the routing load: scores by hand, thresholds, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from defense_tasks import changed, copies, held_images, make_task, used_model
from planted_channel import coloured, planted_task, stamped
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.ibd_psc import norms_in_order, scaled
from backdoorbench_moe.defenses.routing_load import variation
from backdoorbench_moe.defenses.scale_up import class_moments, multiply
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.ops.detection import auroc
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task


def grey(*values: int) -> Tensor:
    """Images of 32x32 pixels of one value each."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 32, 32)


def answering(task: DefenseTask, classes: dict[int, int]) -> DefenseTask:
    """A task whose model answers class `classes[value]` for a grey image, with a probability of e / (e + 2)."""

    def logits(_: nn.Module, images: Tensor) -> Tensor:
        called = torch.tensor([classes.get(int(image[0, 0, 0]), 0) for image in images])
        return nn.functional.one_hot(called, 3).float()

    return replace(task, logits=logits)


def test_multiplied_images_are_clipped() -> None:
    assert multiply(grey(10, 100), 3)[:, 0, 0, 0].tolist() == [30, 255]


@pytest.mark.parametrize("factor", [255, 10**8, 10**12])
def test_a_factor_of_any_size_leaves_black_and_makes_white_of_all_else(factor) -> None:
    every = torch.arange(256).byte().view(1, 1, 16, 16)
    assert multiply(every, factor).flatten().tolist() == [0] + [255] * 255


@pytest.mark.parametrize("statistic", ["agreement", "probability"])
def test_scale_up_by_hand(statistic) -> None:
    """10 is class 1, and so are 30, 50 and 70, but not 90 and 110: 3 of 5 agree. White is always called alike."""
    task = answering(make_task(used_model())[0], {10: 1, 30: 1, 50: 1, 70: 1, 90: 2, 110: 0, 255: 2})
    judge = create_defense("scale-up", statistic=statistic, threshold=0.5)(task).filter.judge
    share = torch.tensor([0.6, 1.0, 1.0]).double()
    if statistic == "probability":
        share = share * (math.e / (math.e + 2)) + (1 - share) / (math.e + 2)
    torch.testing.assert_close(judge(grey(10, 255, 0)), share, atol=1e-6, rtol=0)


def test_scores_are_normalised_by_the_class_that_is_predicted() -> None:
    means, deviations = class_moments(
        torch.tensor([0.0, 1, 0.4, 0.4, 0.8]).double(), torch.tensor([0, 0, 1, 1, 2]), 4
    )
    everything = np.array([0.0, 1, 0.4, 0.4, 0.8])
    assert means.tolist() == pytest.approx([0.5, 0.4, everything.mean(), everything.mean()])
    expected = [math.sqrt(0.5), 0.01, everything.std(ddof=1), everything.std(ddof=1)]
    assert deviations.tolist() == pytest.approx(expected)
    task = answering(make_task(used_model(), clean=Split(grey(*range(40)), torch.zeros(40).long()))[0], {})
    options = {"normalise": True, "reserve": 4, "threshold": 0.5}
    judge = create_defense("scale-up", **options)(task).filter.judge
    assert judge(grey(1, 2)).tolist() == [0.0, 0.0], "all clean images have the score 1, and so have these"


def test_the_deviation_that_divides_a_score_is_that_of_the_predicted_class() -> None:
    """With factors 3 and 5, the clean scores of class 1 are 1 and 1/2, and those of class 0 are 1, 0 and 1/2."""
    classes = {10: 1, 12: 1, 30: 1, 36: 1, 50: 1, 120: 2, 200: 2, 205: 2}
    clean = Split(grey(10, 12, 1, 40, 41), torch.zeros(5).long())
    options = {"factors": (3, 5), "normalise": True, "reserve": 5, "threshold": 0.5}
    task = answering(make_task(used_model(), clean=clean)[0], classes)
    judge = create_defense("scale-up", **options)(task).filter.judge
    expected = [(1 - 0.75) / (0.5 * math.sqrt(0.5)), (0 - 0.5) / 0.5]
    assert judge(grey(10, 40)).tolist() == pytest.approx(expected)


def test_the_threshold_is_calibrated_or_fixed() -> None:
    """Class 1 begins at 200. Three images keep class 0 under 4 of 5 factors, six under 3, and eleven under 2."""
    classes = {n: int(n >= 200) for n in range(256)}
    task = answering(
        make_task(used_model(), clean=Split(grey(*range(20, 40)), torch.zeros(20).long()))[0], classes
    )
    for fpr, threshold in ((0.15, 0.8), (0.2, 0.6), (0.43, 0.6), (0.48, 0.4)):
        # The third, fourth, ninth and tenth highest of 20 scores.
        found = create_defense("scale-up", fpr=fpr)(task).filter
        assert found.threshold == pytest.approx(threshold) and found.details["calibrated_on"] == 20
    fixed = create_defense("scale-up", threshold=0.3)(task).filter
    assert fixed.threshold == 0.3 and fixed.details["calibrated_on"] == 0 and "fixed" in fixed.reason


def test_a_backdoor_that_survives_scaling_is_told_perfectly() -> None:
    """Perfect scores give an area of 1, not 0: higher is more suspicious."""
    clean, triggered = grey(*range(20, 60)), grey(*([5] * 10))
    classes = {n: 1 if n <= 55 else 2 * int(n == 255) for n in range(256)} | {255: 2}
    task = answering(make_task(used_model(), clean=Split(clean, torch.zeros(40).long()))[0], classes)
    judge = create_defense("scale-up", factors=(3, 5, 7))(task).filter.judge
    assert auroc(judge(clean).numpy(), judge(triggered).numpy()).value == 100


def test_ibd_psc_by_hand() -> None:
    """Norms of scale 1 and 2 and a shift: logits of each scaled model computed by hand."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            with torch.no_grad():
                self.second.weight.fill_(2.0)
                self.second.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))

        def forward(self, images: Tensor) -> Tensor:
            return self.second(self.first(images)).mean((2, 3))

    model = Two().eval()
    task, _ = make_task(model)
    before = copies(model)
    assert norms_in_order(task, task.clean.images[:2]) == [model.first, model.second]
    options = {"models": 2, "reserve": 3, "threshold": 0.9, "factor": 1.5}
    result = create_defense("ibd-psc", **options)(task)
    assert result.filter.details["norms"] == [1, 2] and not changed(before, copies(model))
    images = task.clean.images[3:9]
    mean, eps = (images.double() / 255).mean((2, 3)), 1 / math.sqrt(1 + 1e-5)
    shift = torch.tensor([0.1, 0.2, 0.3]).double()
    called = (2 * eps * eps * mean + shift).argmax(1, keepdim=True)
    last = (3 * eps * eps * mean + 1.5 * shift).softmax(1).gather(1, called)
    both = (3 * eps * eps * 1.5 * mean + 1.5 * shift).softmax(1).gather(1, called)
    torch.testing.assert_close(result.filter.judge(images), ((last + both) / 2).squeeze(1), atol=1e-5, rtol=0)


def test_the_first_number_of_norms_is_the_smallest_that_breaks_the_clean_task() -> None:
    """The model is wrong about clean images once its third last norm is scaled."""
    model = used_model("wide_resnet")
    task, _ = make_task(model, name="wide_resnet")
    base = model.block3.norm1.weight.detach().clone()

    def answers(_: nn.Module, images: Tensor) -> Tensor:
        wrong = int(not torch.equal(model.block3.norm1.weight, base))
        return nn.functional.one_hot((task.clean.labels[: len(images)] + wrong) % 3, 3).float()

    defense = create_defense("ibd-psc", models=2, reserve=24)
    norms = norms_in_order(task, task.clean.images[:2])
    assert norms[-3] is model.block3.norm1 and len(norms) == 7
    assert defense._choose(replace(task, logits=answers), norms, task.clean) == [3, 4]
    right = lambda _, images: nn.functional.one_hot(task.clean.labels[: len(images)], 3).float()  # noqa: E731
    assert defense._choose(replace(task, logits=right), norms, task.clean) == [6, 7]
    never = create_defense("ibd-psc", models=2, reserve=24, error=1.0)
    assert never._choose(replace(task, logits=answers), norms, task.clean) == [6, 7], (
        "no more than all are wrong"
    )


def test_norms_that_are_not_called_do_not_count() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return self.called(images).mean((2, 3))

    task, _ = make_task(Unused().eval())
    options = {"reserve": 3, "threshold": 0.9}
    assert create_defense("ibd-psc", models=1, **options)(task).filter.details["norms"] == [1]
    with pytest.raises(ConfigError, match=r"models: expected at most .* Unused has 1, got 2"):
        create_defense("ibd-psc", models=2, **options)(task)


def test_scaled_norms_are_restored_bit_for_bit() -> None:
    model = used_model()
    before = copies(model)
    with scaled([model.norm, model.reduce_norm], 1.1):
        assert changed(before, copies(model)) == {
            "norm.weight", "norm.bias", "reduce_norm.weight", "reduce_norm.bias"
        } - {name for name in before if not before[name].any()}  # fmt: skip
    assert not changed(before, copies(model))


def test_ibd_psc_tells_the_planted_backdoor() -> None:
    task = planted_task()
    judge = create_defense("ibd-psc", models=1, reserve=30)(task).filter.judge
    area = auroc(judge(coloured(60, 5).images).numpy(), judge(stamped(coloured(60, 6).images)).numpy())
    assert area.value > 95


def routing_task(table: dict[int, Tensor], **given: object) -> DefenseTask:
    """A task in which the first pixel decides which of tables (E, P) of gates is the routing; positive ones count."""

    def routing(_: nn.Module, images: Tensor):
        gates = torch.stack([table[int(image[0, 0, 0])] for image in images])
        yield [Routing("one", gates, gates > 0), Routing("two", gates, gates > 0)]

    task, _ = make_task(used_model(), **given)
    return replace(task, routing=routing)


EVEN = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
SKEWED = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]])
CROWDED = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])


def entropy(*shares: float) -> float:
    return -sum(p * math.log(p) for p in shares if p)


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        ("entropy", [0.0, 1 - entropy(0.75, 0.25) / math.log(2), 1.0]),
        ("largest", [0.5, 0.75, 1.0]),
        ("distance", [0.0, 0.0, 0.25]),
    ],
)
def test_loads_of_experts_by_hand(statistic, expected) -> None:
    """Clean images have loads of 1/2 and 3/4, the nearest of which is 1/4 from a load of 1."""
    clean = Split(grey(*[0, 1] * 20), torch.zeros(40).long())
    task = routing_task({0: EVEN, 1: SKEWED, 2: CROWDED}, clean=clean)
    found = create_defense("routing-load", statistic=statistic, reserve=10)(task).filter
    assert found.details["load"] == "experts"
    assert found.judge(grey(0, 1, 2)).tolist() == pytest.approx(expected)
    assert auroc(found.judge(grey(0, 1)).numpy(), found.judge(grey(2, 2)).numpy()).value == 100


def test_loads_of_patches_by_hand() -> None:
    """Two experts with two of four patches each: other patches, one common, the same."""
    tables = [
        torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]),
        torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]]),
        torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0]]),
    ]
    clean = Split(grey(*[0, 1] * 20), torch.zeros(40).long())
    task = routing_task(dict(enumerate(tables)), clean=clean)
    found = create_defense("routing-load", statistic="entropy", load="patches", reserve=10)(task).filter
    one = 1 - entropy(0.25, 0.5, 0.25) / math.log(4)
    assert found.judge(grey(0, 1, 2)).tolist() == pytest.approx([0.0, one, 0.5])
    with pytest.raises(ConfigError, match="load: PMoE has the same load of experts for all images"):
        create_defense("routing-load", load="experts", reserve=10)(task)


def test_only_gates_of_selected_pairs_are_a_load() -> None:
    """Both images have the same gates. In one, expert 0 takes both patches, in the other, each expert takes one."""
    gates = torch.tensor([[0.9, 0.6], [0.1, 0.4]])
    taken = torch.tensor([[[True, True], [False, False]], [[True, False], [False, True]]])

    def routing(_: nn.Module, images: Tensor):
        selected = taken[images[:, 0, 0, 0].long()]
        yield [Routing("one", gates.expand(len(images), 2, 2), selected)]

    task, _ = make_task(used_model(), clean=Split(grey(*[0, 1] * 20), torch.zeros(40).long()))
    task = replace(task, routing=routing)
    found = create_defense("routing-load", statistic="largest", load="gates", reserve=10)(task).filter
    assert found.judge(grey(0, 1)).tolist() == pytest.approx([1.0, 0.9 / 1.3])


def test_loads_are_compared_with_those_of_the_reserved_images_only() -> None:
    """Of 40 clean images with different loads, those that set the threshold have no load that is known."""
    tables = {n: torch.tensor([[0.5 + n / 100] * 2, [0.5 - n / 100] * 2]) for n in range(40)}
    clean = Split(grey(*range(40)), torch.zeros(40).long())
    found = create_defense("routing-load", reserve=10)(routing_task(tables, clean=clean)).filter
    scores = found.judge(clean.images)
    assert found.details["load"] == "gates" and int((scores < 1e-6).sum()) == 10
    # The highest of 30 scores, since 5% of 31 is 1.
    assert found.threshold == pytest.approx(scores.max().item()) and found.threshold > 0.009


def test_the_variation_of_loads_by_hand() -> None:
    """Shares of 1/2 and 3/4 deviate by sqrt(2) / 8, relative to an even share of 1/2 by twice as much."""
    loads = [torch.tensor([[0.5, 0.5], [0.75, 0.25]]), torch.tensor([[0.2, 0.8], [0.2, 0.8]])]
    assert variation(loads[:1]) == pytest.approx(math.sqrt(2) / 4)
    assert variation(loads) == pytest.approx(math.sqrt(2) / 8)


def test_who_selects_decides_on_the_load() -> None:
    """An expert that selects the class token has one patch less; patches still differ more than experts."""
    tables = {
        0: torch.tensor([[0.9, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]),
        1: torch.tensor([[0.0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]),
    }
    task = routing_task(tables, clean=Split(grey(*[0, 1] * 20), torch.zeros(40).long()))
    assert create_defense("routing-load", reserve=10)(task).filter.details["load"] == "gates"
    # Each patch selects one expert, and all but two of them the same.
    tables = {
        0: torch.tensor([[1.0] * 6, [0] * 6]),
        1: torch.tensor([[1.0] * 4 + [0] * 2, [0] * 4 + [1] * 2]),
    }
    task = routing_task(tables, clean=Split(grey(*[0, 1] * 20), torch.zeros(40).long()))
    assert create_defense("routing-load", reserve=10)(task).filter.details["load"] == "experts"


def test_where_everything_is_selected_the_gates_remain() -> None:
    tables = {0: torch.tensor([[0.5, 0.5], [0.5, 0.5]]), 1: torch.tensor([[0.9, 0.9], [0.1, 0.1]])}
    task = routing_task(tables, clean=Split(grey(*[0, 1] * 20), torch.zeros(40).long()))
    found = create_defense("routing-load", statistic="largest", reserve=10)(task).filter
    assert found.details["load"] == "gates" and found.judge(grey(0, 1)).tolist() == pytest.approx([0.5, 0.9])
    constant = routing_task({0: EVEN}, clean=Split(grey(*[0] * 40), torch.zeros(40).long()))
    found = create_defense("routing-load", reserve=10)(constant).filter
    assert found.details["variation"] == 0, "of a model that has collapsed"
    assert not (found.judge(grey(0, 0)) > found.threshold).any(), "nothing is rejected"


def test_a_filter_stays_as_it_is_when_its_defense_is_applied_again() -> None:
    """The first model differs in the load of its experts, the second in its gates only."""
    clean = Split(grey(*[0, 1] * 20), torch.zeros(40).long())
    defense = create_defense("routing-load", statistic="largest", reserve=10)
    uneven = torch.tensor([[0.9, 0.9, 0, 0], [0, 0, 0.1, 0.1]])
    first = defense(routing_task({0: uneven, 1: SKEWED}, clean=clean)).filter
    gates = {0: torch.tensor([[0.5, 0.5], [0.5, 0.5]]), 1: torch.tensor([[0.9, 0.9], [0.1, 0.1]])}
    second = defense(routing_task(gates, clean=clean)).filter
    assert (first.details["load"], second.details["load"]) == ("experts", "gates")
    assert first.judge(grey(0)).tolist() == pytest.approx([0.5]), "pairs are counted; the gates give 0.9"


def test_real_models_of_both_kinds_of_routing() -> None:
    task, _ = make_task(used_model(), clean=held_images(40))
    options = {"reserve": 8, "fpr": 0.25}
    assert create_defense("routing-load", **options)(task).filter.details["load"] == "gates"
    mixture, _ = make_mixture_task(build_mixture())
    assert create_defense("routing-load", **options)(mixture).filter.details["load"] == "gates"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scale-up", {"factors": ()}, r"factors: expected integers of at least 2, got \(\)"),
        ("scale-up", {"factors": (1, 3)}, "factors: expected integers of at least 2"),
        ("scale-up", {"fpr": 1.0}, r"fpr: expected a number in \(0, 1\)"),
        ("scale-up", {"threshold": math.inf}, "threshold: expected a finite number"),
        ("scale-up", {"calibrate": 5}, "calibrate: expected enough images to set a threshold"),
        ("ibd-psc", {"factor": 1.0}, "factor: expected a number above 1, got 1.0"),
        ("ibd-psc", {"models": 0}, "models: expected an integer of at least 1, got 0"),
        ("ibd-psc", {"error": 1.2}, r"error: expected a number in \[0, 1\], got 1.2"),
        ("routing-load", {"reserve": 1}, "reserve: expected an integer of at least 2, got 1"),
        ("routing-load", {"statistic": "mean"}, "statistic: unknown 'mean'"),
    ],
)
def test_values_out_of_range_are_refused(name, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense(name, **options)


def test_too_few_images_and_unfit_models_are_refused() -> None:
    defense = create_defense("ibd-psc", clean_fraction=1.0, reserve=16)
    assert defense.count(35, 3) == 35
    with pytest.raises(
        ConfigError, match="34 images is 34; 16 choose how many norms are scaled, and the 18 left are"
    ):
        defense.count(34, 3)
    assert create_defense("ibd-psc", clean_fraction=1.0, reserve=16, threshold=0.9).count(16, 3) == 16
    with pytest.raises(
        ConfigError, match="15 images is 15; expected at least 16, which choose how many norms are scaled"
    ):
        create_defense("ibd-psc", clean_fraction=1.0, reserve=16, threshold=0.9).count(15, 3)
    with pytest.raises(ConfigError, match="18 images is 18, which are too few to set a threshold"):
        create_defense("scale-up", clean_fraction=1.0).count(18, 3)
    with pytest.raises(ConfigError, match=r"models: expected at most .* WideResNet has 7, got 8"):
        create_defense("ibd-psc", models=8).check(used_model("wide_resnet"))
    with pytest.raises(ConfigError, match="model: expected a routed model, WideResNet has no routing"):
        create_defense("routing-load").check(used_model("wide_resnet"))


def test_too_few_images_of_the_tasks_of_a_mixture_are_refused() -> None:
    """Of 23 images, a mixture of two experts has 11 of each task: 18 are left, too few for a rate of 5%."""
    task, _ = make_mixture_task(build_mixture())
    defense = create_defense("strip", blends=4, clean_fraction=0.5)
    assert defense.count(46, 3) == 23
    task = replace(task, granted={"clean": task.clean.take(torch.arange(22))})
    with pytest.raises(
        ConfigError, match=r"^defense 'strip': clean_fraction: with 0\.5, .* is 22; 4 are .* 18 left are"
    ):
        defense(task)
