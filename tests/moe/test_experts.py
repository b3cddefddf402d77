"""Muting experts inside a block, and keeping them muted in training."""

from __future__ import annotations

import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model

from backdoorbench_moe.moe.experts import active_experts, kept_muted, mute, muted
from backdoorbench_moe.testing.mixtures import build_mixture


def test_muted_ends_with_the_block_bit_for_bit_whatever_happens_in_it() -> None:
    model, images = used_model(), torch.rand(4, 3, 32, 32)
    before, heard = copies(model), model(images)
    [first, second, *_] = model.experts()
    with pytest.raises(KeyError), muted(model, [first, second]):
        assert (model.moe.conv.weight[:10] == 0).all() and (model.moe.conv.weight[10:] != 0).any()
        assert not torch.allclose(model(images), heard)
        raise KeyError
    assert not changed(before, copies(model)) and torch.equal(model(images), heard)


def test_active_are_those_that_are_neither_mute_nor_masked() -> None:
    model = used_model()
    mute(model, [model.experts()[1]])
    assert [expert.index for expert in active_experts(model, model.experts())] == [0, 2, 3]
    mixture = build_mixture()
    first, second, third, fourth = mixture.experts()
    mixture.mask_expert(second)
    mute(mixture, [third])
    assert active_experts(mixture, mixture.experts()) == [first, fourth]


@pytest.mark.parametrize("recipe", [{"momentum": 0.9}, {"optimizer": "adamw", "weight_decay": 0.1}])
def test_kept_muted_stays_zero_while_all_else_learns(recipe) -> None:
    model = used_model()
    [first, second, *_] = model.experts()
    mute(model, [second])
    before, task = copies(model), make_task(model, **recipe)[0]
    with kept_muted(model, [second]):
        task.tune(model, task.clean, epochs=2)
    state = model.state_dict()
    for name, (start, stop) in second.output.items():
        assert (state[name][start:stop] == 0).all(), name
    start, stop = first.output["moe.conv.weight"]
    assert (state["moe.conv.weight"][start:stop] != before["moe.conv.weight"][start:stop]).any()
    assert {"moe.router.weight", "trunk.stem.weight", "head.weight"} <= changed(before, copies(model))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
