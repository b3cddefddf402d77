"""A reset part is drawn anew, re-trained, and nothing beside it moves."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import changed, copies, make_task, trained_model, used_model

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.experts import mute


@pytest.mark.parametrize("recipe", [{"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adamw"}])
@pytest.mark.parametrize(("option", "index"), [(2, 2), ("moe/1", 1)])
def test_only_the_experts_own_rows_change(option, index, recipe) -> None:
    model = used_model()
    before, expert = copies(model), model.experts()[index]
    task, reported = make_task(model, **recipe)
    result = create_defense("expert-reset", expert=option, epochs=2)(task)
    after = copies(model)
    [judged] = result.judgements
    assert (judged.about, judged.suspicious, judged.scores) == ("expert", [f"moe/{index}"], None)
    assert changed(before, after) <= expert.own.keys()
    for name, (start, stop) in expert.own.items():
        assert torch.equal(before[name][:start], after[name][:start]), name
        assert torch.equal(before[name][stop:], after[name][stop:]), name
    [(stage, reset)] = reported
    start, stop = expert.own["moe.conv.weight"]
    drawn = task.fresh().state_dict()["moe.conv.weight"][start:stop]
    assert stage == "reset" and torch.equal(reset["moe.conv.weight"][start:stop], drawn)
    assert not torch.equal(after["moe.conv.weight"][start:stop], drawn), "and then trained"
    assert not torch.equal(before["moe.conv.weight"][start:stop], drawn)


def test_its_norms_are_those_of_the_clean_images_after_every_stage() -> None:
    model = used_model()
    task, reported = make_task(model)
    create_defense("expert-reset", expert=0, epochs=1)(task)
    images = task.clean.images.float() / 255
    for state in (reported[0][1], copies(model)):
        model.load_state_dict(state)
        with torch.no_grad():
            features = model.reduce(model.reduce_norm(model.trunk(images)).relu())
            behind = model.moe(features)[0][:, :5].double()
        torch.testing.assert_close(
            state["norm.running_mean"][:5].double(), behind.mean((0, 2, 3)), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            state["norm.running_var"][:5].double(), behind.var((0, 2, 3)), rtol=1e-3, atol=1e-6
        )


@pytest.mark.slow
def test_by_default_it_is_the_one_that_expert_drop_would_drop() -> None:
    (one, clean), (other, _) = trained_model(seed=2), trained_model(seed=2)
    drop = create_defense("expert-drop")(make_task(one, clean=clean)[0])
    reset = create_defense("expert-reset", epochs=1)(make_task(other, clean=clean)[0])
    assert drop.judgements[0].suspicious == ["moe/1"]
    assert reset.judgements[0].suspicious == drop.judgements[0].suspicious
    assert reset.judgements[0].scores == drop.judgements[0].scores


def test_an_expert_that_is_mute_is_not_revived() -> None:
    """Without it, nothing changes, so that it would be missed least."""
    model, clean = trained_model()
    mute(model, [model.experts()[1]])
    before = copies(model)
    [judgement] = create_defense("expert-reset", epochs=1)(make_task(model, clean=clean)[0]).judgements
    assert judgement.suspicious != ["moe/1"]
    start, stop = model.experts()[1].own["moe.conv.weight"]
    assert torch.equal(model.moe.conv.weight[start:stop], before["moe.conv.weight"][start:stop])
    mute(model, model.experts())
    with pytest.raises(ConfigError, match="expert: all experts are muted or masked"):
        create_defense("expert-reset")(make_task(model, clean=clean)[0])


def test_the_routers_weights_are_new_and_alone_or_with_all_trained() -> None:
    for scope in ("router", "all"):
        model = used_model()
        before, (task, reported) = copies(model), make_task(model)
        result = create_defense("router-reset", scope=scope, epochs=2)(task)
        [(stage, reset)] = reported
        assert (stage, result.stage) == ("reset", "tuned")
        assert changed(before, reset) == {"moe.router.weight"}
        assert torch.equal(reset["moe.router.weight"], task.fresh().moe.router.weight)
        trained = changed(reset, copies(model))
        assert trained == {"moe.router.weight"} if scope == "router" else "trunk.stem.weight" in trained


def test_the_fresh_model_is_the_same_at_every_call_and_another_for_another_seed() -> None:
    one, again = (copies(make_task(used_model(), seed=7)[0].fresh()) for _ in range(2))
    task, _ = make_task(used_model(), seed=8)
    state = torch.get_rng_state()
    first, second = copies(task.fresh()), copies(task.fresh())
    assert not changed(one, again) and not changed(first, second)
    assert {"moe.router.weight", "moe.conv.weight", "head.weight"} <= changed(one, first)
    assert not task.fresh().training and torch.equal(state, torch.get_rng_state())


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="expert: unknown 'moe/7'; did you mean 'moe/"):
        create_defense("expert-reset", expert="moe/7").check(used_model())
    with pytest.raises(ConfigError, match="expert: expected 0 to 3, or a name, got 4"):
        create_defense("expert-reset", expert=4).check(used_model())
    with pytest.raises(ConfigError, match="expert: expected 0 to 3, or a name, got -1"):
        create_defense("expert-reset", expert=-1).check(used_model())
    for name, message in (
        ("expert-reset", "expected a routed model"),
        ("router-reset", "a model with a router"),
    ):
        with pytest.raises(ConfigError, match=f"model: .*{message}, WideResNet has no"):
            create_defense(name).check(used_model("wide_resnet"))
        with pytest.raises(ConfigError, match="epochs: expected an integer of at least 1, got 0"):
            create_defense(name, epochs=0)
