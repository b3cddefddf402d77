"""Only what is in scope is tuned, and as the recipe says."""

from __future__ import annotations

import pytest
from defense_tasks import changed, copies, make_task, used_model

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.errors import ConfigError

SCOPES = {"experts": ("moe.norm.", "moe.conv.", "norm."), "router": ("moe.router.",), "head": ("head.",)}


@pytest.mark.parametrize(("scope", "prefixes"), SCOPES.items())
def test_what_is_out_of_scope_keeps_its_weights_and_statistics(scope, prefixes) -> None:
    model = used_model()
    before = copies(model)
    result = create_defense("fine-tuning", scope=scope, epochs=2)(make_task(model)[0])
    names = changed(before, copies(result.model))
    assert result.stage == "tuned" and names
    assert all(name.startswith(prefixes) for name in names)
    assert {f"{prefix}weight" for prefix in prefixes} <= names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_all_is_all() -> None:
    model = used_model()
    before = copies(model)
    create_defense("fine-tuning", epochs=1)(make_task(model)[0])
    weights = {name for name, _ in model.named_parameters() if name.endswith("weight")}
    assert weights <= changed(before, copies(model))
    assert "trunk.block1.norm1.running_mean" in changed(before, copies(model))


def test_epochs_and_learning_rate_are_the_options_and_else_the_runs() -> None:
    task, _ = make_task(used_model(), lr=0.05)
    create_defense("fine-tuning", epochs=2, lr=0.01)(task)
    create_defense("fine-tuning", epochs=1)(task)
    rows = task.tune.history
    assert [(row["epoch"], row["lr"]) for row in rows] == [(1, 0.01), (2, 0.01), (3, 0.05)]


def test_a_part_the_model_lacks_is_refused() -> None:
    for scope in ("experts", "router"):
        with pytest.raises(
            ConfigError, match=r"scope: expected one of \['all', 'head'\] for WideResNet, got"
        ):
            create_defense("fine-tuning", scope=scope).check(used_model("wide_resnet"))
    with pytest.raises(ConfigError, match="epochs: expected an integer of at least 1, got 0"):
        create_defense("fine-tuning", epochs=0)
