"""The memory estimate that a command prints."""

from __future__ import annotations

import pytest
from bbmoe_lm.models.llama import Llama

from backdoorbench_moe.config import build_spec
from backdoorbench_moe.engine import runner
from backdoorbench_moe.engine.memory import memory_line, memory_needed, memory_warning
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.runner import Runner
from backdoorbench_moe.errors import BbmoeWarning

SHAPE = {"hidden_size": 64, "layers": 3, "heads": 4, "intermediate_size": 96}


@pytest.fixture
def spec():
    train = {"epochs": 1, "batch_size": 200}
    return build_spec(
        {
            "dataset": {"name": "tasks", "texts": 12, "test_texts": 4, "refused": 12, "refused_test": 4},
            "model": {"name": "llama", **SHAPE},
            "train": {"epochs": 1, "batch_size": 400},
            "mixture": {
                "experts": 3,
                "poisoned_experts": [1],
                "expert_train": train,
                "gate_train": train,
                "gate_images": 8,
            },
        }
    )


def test_each_run_takes_what_its_training_takes(spec, tmp_path):
    texts = Runner(spec, tmp_path).workplace.data
    model, length = Llama(**texts.model_options, **SHAPE), texts.context
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    dense = model.bytes_needed(1, 1, "nothing")
    assert 0 < dense - weights < 100_000
    # The mixture is already built; while the benign expert is tuned, the poisoned expert is in memory, too.
    held = model.bytes_needed(1, 1, "nothing", experts=3)
    assert memory_needed(spec, texts) == {
        "base": model.bytes_needed(400, length, "all") + held,
        "expert": model.bytes_needed(200, length, "mlps") + held + dense,
        "poisoned expert": model.bytes_needed(400, length, "mlps") + dense + held,
        "mixture": model.bytes_needed(200, length, "gates", experts=3),
    }


class Lines(Observer):
    def __init__(self):
        self.lines = []

    def on_message(self, text):
        self.lines.append(text)


def test_it_is_said_before_the_model_is_built(spec, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(runner, "machine_memory", lambda _: 3 << 30)
    monkeypatch.setattr(Runner, "maker", stop)
    seen = Lines()
    with pytest.raises(Stop):
        Runner(spec, tmp_path / "runs", seen).attack(spec)
    assert seen.lines[-1].startswith("memory: about ") and seen.lines[-1].endswith(
        "; 3.0 GiB in this machine"
    )
    monkeypatch.setattr(runner, "machine_memory", lambda _: 1 << 20)
    with pytest.warns(BbmoeWarning, match=r"^the .* takes about .* GiB of memory, and there are 0\.0 GiB; "):
        Runner(spec, tmp_path / "runs").say_memory(spec)


def test_lines():
    needed = {"base": 2 << 30, "mixture": 3 << 29}
    assert memory_line(needed, 4 << 30) == (
        "memory: about 2.0 GiB at most (GiB: base 2.0, mixture 1.5); 4.0 GiB in this machine"
    )
    assert memory_line(needed, None) == "memory: about 2.0 GiB at most (GiB: base 2.0, mixture 1.5)"
    assert memory_warning(needed, 2 << 30) is None and memory_warning(needed, None) is None
    assert memory_warning(needed, (2 << 30) - 1).startswith(
        "the base takes about 2.0 GiB of memory, and there are 2.0"
    )
