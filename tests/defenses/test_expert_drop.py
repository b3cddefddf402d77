"""Which expert goes, that it stays gone, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from defense_tasks import SMALL, changed, copies, make_task, trained_model, used_model
from torch import nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.experts import mute
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task


def accuracy(model: nn.Module, clean: Split) -> float:
    pairs = zip(clean.images, clean.labels, strict=True)
    with torch.no_grad():
        hits = [int(model(image[None].float() / 255).argmax()) == int(label) for image, label in pairs]
    return 100 * sum(hits) / len(hits)


def silenced_copy(model: nn.Module, gone: tuple[int, ...]) -> nn.Module:
    """An own way to silence experts: the head no longer hears their channels."""
    twin = used_model()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for index in gone:
            twin.head.weight[:, 5 * index : 5 * (index + 1)] = 0
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_one_dropped_is_that_of_an_own_loop_over_deaf_heads(seed) -> None:
    model, clean = trained_model(seed=seed)
    alone = [accuracy(silenced_copy(model, (e,)), clean) for e in range(4)]
    assert sorted(alone)[-1] > sorted(alone)[-2], "else the test could not tell"
    result = create_defense("expert-drop")(make_task(model, clean=clean)[0])
    assert result.stage == "dropped"
    assert result.judgements[0].scores == pytest.approx({f"moe/{e}": alone[e] for e in range(4)})
    chosen = alone.index(max(alone))
    assert result.judgements[0].suspicious == [f"moe/{chosen}"]
    assert result.judgements[0].details["accuracy"] == pytest.approx([max(alone)])
    assert accuracy(model, clean) == pytest.approx(max(alone))


@pytest.mark.slow
def test_several_are_dropped_one_after_the_other_as_by_hand() -> None:
    model, clean = trained_model(seed=1)
    gone: list[int] = []
    for _ in range(3):
        found = {e: accuracy(silenced_copy(model, (*gone, e)), clean) for e in range(4) if e not in gone}
        gone.append(max(found, key=lambda e: found[e]))
    result = create_defense("expert-drop", count=3)(make_task(model, clean=clean)[0])
    assert result.judgements[0].suspicious == [f"moe/{e}" for e in gone]
    assert result.judgements[0].details["accuracy"][-1] == pytest.approx(accuracy(model, clean))
    assert len(result.judgements[0].scores) == 4


def silent(model: nn.Module) -> frozenset[str]:
    """The names of the experts that are muted."""
    state = model.state_dict()
    return frozenset(
        expert.name
        for expert in model.experts()
        if not any(state[name][start:stop].any() for name, (start, stop) in expert.output.items())
    )


def test_the_second_is_chosen_by_the_accuracy_without_the_first() -> None:
    """Alone, expert 1 is missed less than 2 and 3; but together with expert 0, which goes first, most of all."""
    right = {"": 100, "0": 90, "1": 80, "2": 70, "3": 60, "01": 10, "02": 50, "03": 40}

    def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        gone = "".join(sorted(name.removeprefix("moe/") for name in silent(model)))
        return torch.eye(2)[(torch.arange(len(images)) >= right[gone]).long()]

    task, _ = make_task(
        used_model(), clean=Split(torch.zeros(100, 3, 32, 32).byte(), torch.zeros(100).long())
    )
    [judgement] = create_defense("expert-drop", count=2)(replace(task, logits=answers)).judgements
    assert judgement.suspicious == ["moe/0", "moe/2"] and judgement.details["accuracy"] == [90, 50]
    assert judgement.scores == {"moe/0": 90, "moe/1": 80, "moe/2": 70, "moe/3": 60}


def test_only_what_leaves_the_expert_is_set_to_zero() -> None:
    model, clean = trained_model()
    before = copies(model)
    result = create_defense("expert-drop")(make_task(model, clean=clean)[0])
    [name] = result.judgements[0].suspicious
    [expert] = [expert for expert in model.experts() if expert.name == name]
    after = copies(model)
    assert changed(before, after) == set(expert.output)
    mute(model, [expert])
    assert not changed(after, copies(model))


def test_of_equals_the_first_goes() -> None:
    model = used_model()
    with torch.no_grad():
        model.head.weight.zero_()
    result = create_defense("expert-drop", count=2)(make_task(model)[0])
    assert result.judgements[0].suspicious == ["moe/0", "moe/1"]


def test_tuning_afterwards_leaves_it_mute() -> None:
    model = used_model()
    task, reported = make_task(model, momentum=0.9, weight_decay=0.01)
    result = create_defense("expert-drop", count=2, epochs=2)(task)
    [(stage, dropped)] = reported
    assert (stage, result.stage) == ("dropped", "tuned")
    after = copies(model)
    names = result.judgements[0].suspicious
    for expert, (name, (start, stop)) in itertools.product(
        model.experts(), model.experts()[0].output.items()
    ):
        start, stop = expert.output[name]
        if expert.name in names:
            assert (dropped[name][start:stop] == 0).all() and (after[name][start:stop] == 0).all()
        elif name.endswith("weight"):
            assert (dropped[name][start:stop] != after[name][start:stop]).any()
    assert "trunk.stem.weight" in changed(dropped, after)


def test_what_cannot_be_dropped_is_refused() -> None:
    with pytest.raises(ConfigError, match="count: expected 1 to 3 of the 4 experts of PMoE, got 4"):
        create_defense("expert-drop", count=4).check(used_model())
    with pytest.raises(ConfigError, match="model: expected a routed model, WideResNet has no routing"):
        create_defense("expert-drop").check(used_model("wide_resnet"))
    alone = create_model("pmoe", num_experts=1, **SMALL["pmoe"])
    with pytest.raises(
        ConfigError, match="model: expected a layer of at least 2 experts, PMoE has only one in"
    ):
        create_defense("expert-drop").check(alone)
    for options, message in (({"count": 0}, "count: expected"), ({"epochs": -1}, "epochs: expected")):
        with pytest.raises(ConfigError, match=message):
            create_defense("expert-drop", **options)


def test_an_expert_that_is_gone_already_is_not_dropped_again() -> None:
    """Without it, nothing changes, so that it would be missed least; and the last one of a layer stays."""
    model, clean = trained_model()
    gone = []
    for _ in range(3):
        [judgement] = create_defense("expert-drop")(make_task(model, clean=clean)[0]).judgements
        assert len(judgement.scores) == 4
        gone += judgement.suspicious
    assert len(set(gone)) == 3
    with pytest.raises(ConfigError, match="model: expected a layer of at least 2 experts"):
        create_defense("expert-drop")(make_task(model, clean=clean)[0])


def test_an_expert_that_the_router_leaves_out_is_not_dropped() -> None:
    model = build_mixture()
    first, *_ = model.experts()
    model.mask_expert(first)
    with pytest.raises(ConfigError, match="count: expected 1 to 1 of the 3 experts of MergedModel, got 2"):
        create_defense("expert-drop", count=2)(make_mixture_task(model)[0])
    [judgement] = create_defense("expert-drop")(make_mixture_task(model)[0]).judgements
    assert not {expert.name for expert in model.experts() if expert.layer == first.layer} & {
        *judgement.suspicious
    }
