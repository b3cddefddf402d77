"""The batched pass and its statistics, against a slow loop over single images in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations, product
from statistics import fmean, pstdev

import pytest
import torch
from defense_tasks import used_model
from routed_models import TokenChoice, make_triggered, open_with_model
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from backdoorbench_moe.analysis.capture import layer_capture
from backdoorbench_moe.analysis.comparison import compare_layers
from backdoorbench_moe.analysis.passes import LayerPass, run_pass
from backdoorbench_moe.analysis.routing import layer_routing
from backdoorbench_moe.analysis.shift import layer_shift
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.routing import changed_patches

MODELS = {"pmoe": lambda: used_model("pmoe"), "token choice": TokenChoice}


class One:
    """One image in one layer, as sets and lists."""

    def __init__(self, model: RoutedModel, image: torch.Tensor, layer: int) -> None:
        with torch.no_grad():
            output = model.forward_routed(image.unsqueeze(0).float() / 255)
        self.predicted = int(output.logits.argmax())
        self.gates = output.routing[layer].gates[0].double().numpy()
        chosen = output.routing[layer].selected[0]
        self.sets = [set(row.nonzero().flatten().tolist()) for row in chosen]
        self.experts, self.patches = self.gates.shape

    def jaccard(self, other: One, e: int, f: int) -> float:
        union = self.sets[e] | other.sets[f]
        return len(self.sets[e] & other.sets[f]) / len(union) if union else 1.0


@pytest.fixture(params=[("pmoe", 0), ("token choice", 0), ("token choice", 1)], ids=str)
def case(request) -> Iterator[dict]:
    name, number = request.param
    model = MODELS[name]()
    opened = open_with_model(model)
    triggered = make_triggered(opened)
    found = run_pass(model, opened.images.test.images, triggered, precision=opened.precision, batch_size=17)
    yield {
        "name": name,
        "number": number,
        "model": model,
        "opened": opened,
        "triggered": triggered,
        "found": found,
        "clean": [One(model, image, number) for image in opened.images.test.images],
        "stamped": [One(model, image, number) for image in triggered.images],
    }


def approx(value: object) -> object:
    return pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True)


def test_predictions_and_selections(case) -> None:
    for found, ones in ((case["found"].clean, case["clean"]), (case["found"].triggered, case["stamped"])):
        assert found.predicted.tolist() == [one.predicted for one in ones]
        layer = found.layers[case["number"]]
        sets = [[set(row.nonzero().flatten().tolist()) for row in image] for image in layer.selected]
        assert sets == [one.sets for one in ones]
        mass = [[sum(one.gates[e, p] for p in one.sets[e]) for e in range(one.experts)] for one in ones]
        assert layer.gate_mass.flatten().tolist() == approx([value for row in mass for value in row])


def test_routing(case) -> None:
    ones, opened = case["clean"], case["opened"]
    labels = opened.images.test.labels
    layer = case["found"].clean.layers[case["number"]]
    found = layer_routing(layer, labels, 4, case["model"].patch_grid)
    experts, patches, n = ones[0].experts, ones[0].patches, len(ones)
    assert found.grid[0] * found.grid[1] == patches
    for e, p in product(range(experts), range(patches)):
        assert found.frequency[e, p].item() == approx(sum(p in one.sets[e] for one in ones) / n)
        by_class = [
            fmean(p in one.sets[e] for one, y in zip(ones, labels, strict=True) if y == c) for c in range(3)
        ]
        assert found.by_class[:, e, p].tolist() == approx([*by_class, math.nan])
    load = [fmean(len(one.sets[e]) for one in ones) for e in range(experts)]
    assert found.load.tolist() == approx(load)
    assert found.load_share.tolist() == approx([value / sum(load) for value in load])
    assert found.load_cv == approx(pstdev(load) / fmean(load))
    mass = [fmean(sum(one.gates[e, p] for p in one.sets[e]) for one in ones) for e in range(experts)]
    assert found.mass_share.tolist() == approx([value / sum(mass) for value in mass])
    assert found.mass_cv == approx(pstdev(mass) / fmean(mass))
    for e, f in product(range(experts), repeat=2):
        assert found.overlap[e, f].item() == approx(fmean(one.jaccard(one, e, f) for one in ones))
    takers = [sum(p in s for s in one.sets) for one in ones for p in range(patches)]
    assert found.takers.tolist() == approx([takers.count(k) / len(takers) for k in range(experts + 1)])
    assert found.untaken.value == approx(takers.count(0) / n)
    empty = [fmean(not any(p in s for s in one.sets) for one in ones) for p in range(patches)]
    assert found.untaken_frequency.tolist() == approx(empty)
    if case["name"] == "pmoe":
        assert found.gates_over == "patches"
        by_expert = [fmean(entropy(one.gates[e]) / math.log(patches) for one in ones) for e in range(experts)]
        assert found.entropy_by_expert is not None
        assert found.entropy_by_expert.tolist() == approx(by_expert)
        assert found.entropy.value == approx(fmean(by_expert))
    else:
        assert found.gates_over == "experts" and found.entropy_by_expert is None
        values = [entropy(one.gates[:, p]) / math.log(experts) for one in ones for p in range(patches)]
        assert found.entropy.value == approx(fmean(values))


def test_shift(case) -> None:
    found, places = case["found"], case["triggered"].places
    number = case["number"]
    got = layer_shift(
        found.clean.layers[number], found.triggered.layers[number], places, found.divergence[number]
    )
    pairs = [(case["clean"][int(place)], after) for place, after in zip(places, case["stamped"], strict=True)]
    axis = 1 if case["name"] == "pmoe" else 0
    # Gates over the patches have one divergence per expert, gates over the experts one per patch.
    divergences = [jensenshannon(a.gates, b.gates, axis=axis) ** 2 for a, b in pairs]
    assert got.divergence.value == approx(fmean(d.mean() for d in divergences)) and got.divergence.n == 40
    for e, mean in enumerate(got.changed_by_expert):
        values = [len(a.sets[e] ^ b.sets[e]) / max(1, len(a.sets[e]) + len(b.sets[e])) for a, b in pairs]
        assert mean.value == approx(fmean(values))
    by_expert = [mean.value for mean in got.divergence_by_expert]
    if axis:
        assert by_expert == approx([fmean(d[e] for d in divergences) for e in range(4)])
    else:
        assert sum(by_expert) == approx(got.divergence.value)
    assert got.divergence.low < got.divergence.value < got.divergence.high


def test_capture(case) -> None:
    number, triggered, model = case["number"], case["triggered"], case["model"]
    images = case["opened"].images.test.images[triggered.places]
    changed = changed_patches(images, triggered.images, model.patch_size)
    success = torch.arange(len(changed)) % 3 == 0
    got = layer_capture(case["found"].triggered.layers[number], changed, success)
    # From the position of the 6x6 square, not its pixels: it touches four patches of 4x4 pixels, or one of 8x8.
    touched = {0, 1, 8, 9} if model.patch_size == 4 else {0}
    assert changed[:, sorted(touched)].all() and int(changed.sum()) == len(touched) * len(changed)
    assert got.changed_patches.value == len(touched)
    receives = [[bool(s & touched) for s in one.sets] for one in case["stamped"]]
    any_of = [any(row) for row in receives]
    assert got.captured.value == approx(100 * fmean(any_of)) and got.captured.n == 40
    assert got.experts.value == approx(fmean(map(sum, receives)))
    assert got.by_expert.tolist() == approx([fmean(column) for column in zip(*receives, strict=True)])
    miss = [
        [math.comb(one.patches - len(touched), len(s)) / math.comb(one.patches, len(s)) for s in one.sets]
        for one in case["stamped"]
    ]
    untouched = [
        math.comb(one.patches - len(touched), len(taken)) / math.comb(one.patches, len(taken))
        for one in case["stamped"]
        for taken in [set().union(*one.sets)]
    ]
    assert got.blind_captured == approx(100 * (1 - fmean(untouched)))
    assert got.blind_experts == approx(fmean(sum(1 - m for m in row) for row in miss))
    assert got.blind_by_expert.tolist() == approx([1 - fmean(column) for column in zip(*miss, strict=True)])
    for hit, found in ((True, got.asr_captured), (False, got.asr_missed)):
        values = [bool(s) for s, caught in zip(success, any_of, strict=True) if caught == hit]
        assert (found is None) == (not values)
        assert found is None or (found.value, found.n) == (approx(100 * fmean(values)), len(values))
    assert got.asr.value == 35 and got.asr.low < 35 < got.asr.high


def test_blind_routing_is_the_mean_over_all_orders_of_the_patches() -> None:
    """Three experts that overlap, five patches of which the trigger changes two: all 120 orders, one by one."""
    selected = torch.tensor([[[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]], dtype=torch.bool)
    changed = torch.tensor([[True, False, False, True, False]])
    got = layer_capture(layer_of(selected), changed, torch.tensor([True]))
    receives = [(selected[0][:, list(order)] & changed[0]).any(1) for order in permutations(range(5))]
    assert got.blind_captured == approx(100 * fmean(bool(each.any()) for each in receives))
    assert got.blind_experts == approx(fmean(int(each.sum()) for each in receives))
    assert got.blind_by_expert.tolist() == approx(torch.stack(receives).double().mean(0).tolist())


def test_where_every_patch_has_an_expert_capture_is_no_finding() -> None:
    """Top-1 routing without dropped patches: whatever the router does, every trigger is captured."""
    chosen = torch.randint(0, 4, (6, 16), generator=torch.Generator().manual_seed(0))
    selected = torch.nn.functional.one_hot(chosen, 4).transpose(1, 2).bool()
    changed = torch.zeros(6, 16, dtype=torch.bool)
    changed[:, 3] = True
    got = layer_capture(layer_of(selected), changed, torch.ones(6, dtype=torch.bool))
    assert got.captured.value == got.blind_captured == 100
    assert got.experts.value == 1 and got.blind_experts == approx(1)
    assert got.asr_missed is None and got.asr_captured == got.asr


def layer_of(selected: torch.Tensor) -> LayerPass:
    return LayerPass("moe", "experts", selected, torch.empty(0), torch.empty(0))


def test_comparison_with_itself_and_another(case) -> None:
    found, number = case["found"], case["number"]
    own = compare_layers(found.clean.layers, found.clean.layers)[number]
    assert all(mean.value == 1 for mean in own.same)
    before, after = found.clean.layers[number], found.triggered.layers[number]
    some = [type(before)(**{**vars(before), "selected": before.selected[case["triggered"].places]})]
    got = compare_layers(tuple(some), (after,))[0]
    pairs = [
        (case["clean"][int(p)], b) for p, b in zip(case["triggered"].places, case["stamped"], strict=True)
    ]
    for e, f in product(range(len(got.same)), repeat=2):
        assert got.across[e, f].item() == approx(fmean(a.jaccard(b, e, f) for a, b in pairs))
        assert e != f or got.same[e].value == approx(got.across[e, e].item())


def test_without_a_trigger_there_is_one_pass(monkeypatch) -> None:
    model = TokenChoice()
    opened = open_with_model(model)
    found = run_pass(model, opened.images.test.images, None, precision=opened.precision)
    assert found.triggered is None and found.divergence is None and len(found.clean.predicted) == 60


def test_batches_without_a_counted_image() -> None:
    """Every third test image has the target class: with batches of one image, these have nothing to trigger."""
    model = TokenChoice()
    opened = open_with_model(model)
    triggered = make_triggered(opened)
    one, many = (
        run_pass(model, opened.images.test.images, triggered, precision=opened.precision, batch_size=size)
        for size in (1, 60)
    )
    for a, b in zip(one.triggered.layers, many.triggered.layers, strict=True):  # type: ignore[union-attr]
        assert torch.equal(a.selected, b.selected)
    for a, b in zip(one.divergence, many.divergence, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)
