"""Muting and patching of experts against models that are changed by hand and evaluated as a whole."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from defense_tasks import used_model
from routed_models import make_triggered, open_with_model

from backdoorbench_moe.analysis import carriers
from backdoorbench_moe.analysis.carriers import draw_sample, find_carriers
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.moe.experts import mute


def percent(hits: torch.Tensor) -> float:
    return pytest.approx(100 * hits.double().mean().item())


def open_pmoe() -> OpenedRun:
    return open_with_model(used_model("pmoe"))


def test_muting_equals_that_of_a_muted_copy() -> None:
    opened = open_pmoe()
    triggered, test = make_triggered(opened), opened.images.test
    before = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    found = find_carriers(opened, triggered, 1000)
    experts = opened.model.experts()
    groups = [(), *[(e,) for e in experts], *combinations(experts, 2)]
    muted = [found.whole, *found.singles, *found.pairs]
    assert [one.experts for one in muted] == [tuple(e.name for e in group) for group in groups]
    for one, group in zip(muted, groups, strict=True):
        model = copy.deepcopy(opened.model)
        mute(model, group)
        assert one.ba.value == percent(predict(model, test.images, precision="fp32") == test.labels)
        called = predict(model, triggered.images, precision="fp32")
        assert one.asr is not None and one.asr.value == percent(called == triggered.wanted)
        assert (one.ba.n, one.asr.n) == (60, 40)
    assert len({one.asr.value for one in muted}) > 2  # type: ignore[union-attr]
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_patching_puts_the_clean_output_into_the_triggered_pass() -> None:
    """In pMoE, the layers after the experts get nothing but the experts' outputs, so patching is easy by hand."""
    opened = open_pmoe()
    triggered, test, model = make_triggered(opened), opened.images.test, opened.model
    found = find_carriers(opened, triggered, 1000)

    @torch.no_grad()
    def outputs(images: torch.Tensor) -> torch.Tensor:
        x = images.float() / 255
        return model.moe(model.reduce(torch.relu(model.reduce_norm(model.trunk(x)))))[0]

    clean, stamped = outputs(test.images[triggered.places]), outputs(triggered.images)
    size = clean.shape[1] // 4
    for e, one in enumerate(found.patched):
        mixed = stamped.clone()
        mixed[:, e * size : (e + 1) * size] = clean[:, e * size : (e + 1) * size]
        with torch.no_grad():
            called = model.head(torch.relu(model.norm(mixed)).mean((2, 3))).argmax(1)
        assert one.expert == f"moe/{e}"
        assert one.asr.value == percent(called == triggered.wanted)
        assert one.ra.value == percent(called == triggered.true)
    called = predict(model, test.images[triggered.places], precision="fp32")
    assert found.target_rate.value == percent(called == triggered.wanted)  # type: ignore[union-attr]


def test_the_samples_are_reproducible(monkeypatch) -> None:
    opened = open_pmoe()
    triggered = make_triggered(opened)
    one, two = (find_carriers(opened, triggered, 25) for _ in range(2))
    assert one == two and (one.whole.ba.n, one.whole.asr.n) == (25, 25)  # type: ignore[union-attr]
    monkeypatch.setattr(carriers, "MAX_PAIRS", 5)
    assert find_carriers(opened, None, 25).pairs == ()


def test_a_sample_is_compared_with_its_own_labels_and_answers() -> None:
    opened = open_pmoe()
    triggered, test, model = make_triggered(opened), opened.images.test, opened.model
    safe = triggered.true.roll(1)
    found = find_carriers(opened, triggered, 25, safe=safe)
    places, chosen = draw_sample(60, 25, 0, "ba"), draw_sample(40, 25, 0, "asr")
    assert len(set(chosen.tolist())) == 25 and chosen.tolist() != list(range(25))
    called = predict(model, test.images[places], precision="fp32")
    answered = predict(model, triggered.images[chosen], precision="fp32")
    clean = predict(model, test.images[triggered.places[chosen]], precision="fp32")
    whole = found.whole
    assert whole.asr is not None and whole.unsafe is not None and found.target_rate is not None
    assert whole.ba.value == percent(called == test.labels[places])
    assert whole.asr.value == percent(answered == triggered.wanted[chosen])
    assert whole.unsafe.value == percent(answered != safe[chosen])
    assert found.target_rate.value == percent(clean == triggered.wanted[chosen])


def test_single_experts_in_different_layers_are_no_pairs(monkeypatch) -> None:
    """Pairs that do not exist are not called too many."""
    experts = open_pmoe().model.experts()
    alone = [replace(expert, layer=f"blocks.{n}") for n, expert in enumerate(experts)]
    monkeypatch.setattr(carriers, "MAX_PAIRS", 5)
    assert carriers.pairs_of(alone) == [] and not carriers.too_many_pairs(alone)
    assert len(carriers.pairs_of(experts)) == 6 and carriers.too_many_pairs(experts)


def test_without_a_trigger_only_ba_is_measured() -> None:
    found = find_carriers(open_pmoe(), None, 10)
    assert found.whole.asr is None and found.patched == () and found.target_rate is None
    assert len(found.singles) == 4 and len(found.pairs) == 6
