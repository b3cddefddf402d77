"""The public functions: under any of PyTorch's global settings, and given what is not a run."""

from __future__ import annotations

import contextlib
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY_MODEL, Tiny

import backdoorbench_moe as bbmoe
from backdoorbench_moe import data
from backdoorbench_moe.analysis.document import as_document
from backdoorbench_moe.engine.runner import Run
from backdoorbench_moe.engine.torch_state import default_torch_state
from backdoorbench_moe.errors import BbmoeError, ConfigError, RecordError


@contextlib.contextmanager
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def low_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


CONTEXTS = {
    "low precision": low_precision,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": float64,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


def make(output: Path) -> dict[str, Any]:
    """Attack, defend and analyze; the numbers of all three, and what the run's own methods give."""
    [run] = bbmoe.attack(
        model=TINY_MODEL,
        dataset="tiny",
        trigger={"name": "blend", "ratio": np.float64(0.3)},
        recipe="paper",
        train={"epochs": 1, "batch_size": 32},
        poison={"rate": 0.25},
        precision="fp32",
        output=output,
    )
    defended = bbmoe.defend(run, "fine-tuning", clean_fraction=0.5, epochs=1)
    judged = bbmoe.defend(str(run.folder.path), "strip", clean_fraction=0.5)
    document = as_document(bbmoe.analyze(run, carriers_images=20))
    images = torch.linspace(0, 1, 2 * 3 * 32 * 32, dtype=torch.float32, device="cpu").reshape(2, 3, 32, 32)
    model = run.model()
    stamped = run.stamper()(images)
    with torch.no_grad():
        logits = model(images)
    return {
        "metrics": [one.record.metrics for one in (run, defended, judged)],
        "weights": {
            name: value.double().sum().item() for name, value in defended.model().state_dict().items()
        },
        "analysis": [document[key] for key in ("routing", "capture", "carriers", "pixels")],
        "stamped": stamped.tolist(),
        "logits": logits.float().tolist(),
        "trainable": all(p.requires_grad and not p.is_inference() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Any]:
    data.registry.register("tiny")(Tiny)
    try:
        return make(tmp_path_factory.mktemp("plain"))
    finally:
        data.registry.unregister("tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name not in ("autocast", "default device")])
def test_all_works_and_gives_the_same_numbers_under_any_setting(name, tmp_path, plain) -> None:
    with CONTEXTS[name]():
        assert make(tmp_path) == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autocast", "default device"])
def test_what_is_computed_inside_is_the_same_under_settings_that_change_the_users_own_calls(
    name, tmp_path, plain
) -> None:
    with CONTEXTS[name]():
        [run] = bbmoe.attack(
            model=TINY_MODEL,
            dataset="tiny",
            trigger={"name": "blend", "ratio": 0.3},
            recipe="paper",
            train={"epochs": 1, "batch_size": 32},
            poison={"rate": 0.25},
            precision="fp32",
            output=tmp_path,
        )
        defended = bbmoe.defend(run, "fine-tuning", clean_fraction=0.5, epochs=1)
        weights = {k: v.double().sum().item() for k, v in defended.model().state_dict().items()}
    assert [one.record.metrics for one in (run, defended)] == plain["metrics"][:2]
    assert weights == plain["weights"]


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_callers_settings_are_restored(name) -> None:
    def settings() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
        )

    with default_torch_state():
        default = settings()
    with CONTEXTS[name]():
        before = settings()
        with contextlib.suppress(KeyError), default_torch_state():
            assert settings() == default != before
            raise KeyError
        assert settings() == before


class Huge(torch.nn.Module):
    def __repr__(self) -> str:
        return "x" * 10000


NETWORK = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
NOT_RUNS = [torch.zeros(3), 3, None, {"run": 1}, [], object()]


@pytest.mark.parametrize("value", NOT_RUNS, ids=lambda value: type(value).__name__)
def test_what_is_no_run_is_named_by_its_type(value) -> None:
    calls = {
        "run": lambda: bbmoe.defend(value, "fine-tuning"),
        "run ": lambda: bbmoe.analyze(value),
        "path": lambda: bbmoe.load_run(value),
    }
    for parameter, call in calls.items():
        with pytest.raises(ConfigError) as error:
            call()
        message = str(error.value)
        assert message.startswith(f"{parameter.strip()}: expected") and type(value).__name__ in message
        assert len(message) < 200


@pytest.mark.parametrize("key", ["dataset", "model", "trigger", "applicator", "attack", "splitter", "gate"])
def test_a_part_that_is_an_object_is_refused_in_one_line(key) -> None:
    hint = r"; a part of your own needs a plug-in \(see `bbmoe plugin new --help`\)"
    given = {"a Sequential module": NETWORK, "the class Huge": Huge, "an object of class object": object()}
    for got, value in given.items():
        with pytest.raises(ConfigError, match=f"^{key}: expected a name, or a mapping .* got {got}{hint}$"):
            bbmoe.attack(**{key: value})
    with pytest.raises(ConfigError, match=f"^{key}.name: expected a string, got Sequential.*$") as error:
        bbmoe.attack(**{key: {"name": NETWORK}})
    assert "\n" not in str(error.value)


def test_a_defense_that_is_no_name_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="defense: expected a name"):
        bbmoe.defend(tmp_path, Huge)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bbmoe.attack(repeats=0), "repeats: expected at least 1, got 0"),
        (lambda: bbmoe.attack(repeats=10**11), "repeats: expected at most 10000, got 100000000000"),
        (lambda: bbmoe.attack(repeats="2"), "repeats: expected an integer, got '2'"),
        (lambda: bbmoe.attack(settings=3), "settings: expected a list, got 3"),
        (lambda: bbmoe.import_weights("x.pth", 3), "model: expected a name, or a mapping"),
        (lambda: bbmoe.audit(NETWORK, budget="10m"), "budget: expected a number or none, got '10m'"),
        (lambda: bbmoe.audit(NETWORK, checks=3), "checks: expected a list, got 3"),
        (lambda: bbmoe.audit(NETWORK, checks="head"), "checks: unknown 'head'; did you mean 'head-rows'?"),
        (lambda: bbmoe.audit(NETWORK, image_size="32"), "image_size: expected an integer or none, got '32'"),
        (lambda: bbmoe.try_trigger(NETWORK, "warp", seed="1"), "seed: expected an integer or none, got '1'"),
        (lambda: bbmoe.create_trigger(None), "trigger: expected a name, got None"),
        (lambda: bbmoe.create_model(3), "model: expected a name, got 3"),
        (
            lambda: bbmoe.create_model("pmoe", image_size=(32, 32)),
            "image_size: expected an integer, got (32, 32)",
        ),
        (lambda: bbmoe.create_model("pmoe", num_classes="10"), "num_classes: expected an integer, got '10'"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(call, message) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value).startswith(message)


def test_one_setting_and_one_check_need_no_list() -> None:
    assert bbmoe.make_spec("train.lr=0.5").train.lr == 0.5
    audit = bbmoe.audit(NETWORK, checks="head-rows")
    assert [finding.check for finding in audit.findings if finding.score is not None] == ["head-rows"]


def test_a_list_of_runs_says_how_to_unpack_it(monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"got a list of 2; .*\[run\] = attack"):
        bbmoe.analyze([Run(None, None), Run(None, None)])


@pytest.mark.parametrize(
    "call",
    [
        lambda: bbmoe.load_run(""),
        lambda: bbmoe.defend("", "fine-tuning"),
        lambda: bbmoe.analyze(""),
        lambda: bbmoe.attack(output=""),
        lambda: bbmoe.attack(dataset={"name": "cifar10", "root": ""}),
    ],
)
def test_an_empty_path_is_not_the_current_folder(call, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected a file or folder, got ''"):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_tilde_is_the_home_directory_everywhere(tmp_path, monkeypatch) -> None:
    """Nothing is trained: each call gets as far as the folder, whose full name the message has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    calls = [
        lambda: bbmoe.load_run("~/none"),
        lambda: bbmoe.defend("~/none", "fine-tuning"),
        lambda: bbmoe.analyze(Path("~/none")),
        lambda: bbmoe.attack(dataset={"name": "cifar10", "root": "~/none"}),
        lambda: bbmoe.attack(trigger={"name": "blend", "image": "~/none"}),
    ]
    for call in calls:
        with pytest.raises(BbmoeError) as error:
            call()
        assert f"{tmp_path}/none" in str(error.value) or "expected a picture file" in str(error.value)
    with pytest.raises(ConfigError, match="an existing user behind '~', got '~nobody-of-that-name/x'"):
        bbmoe.load_run("~nobody-of-that-name/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=f"output folder {tmp_path}/file"):
        bbmoe.attack(
            output="~/file", dataset="tiny", model=TINY_MODEL, trigger="square", poison={"rate": 0.25}
        )


@pytest.mark.slow
def test_a_run_and_its_figures_show_themselves_in_a_notebook(tmp_path, capsys) -> None:
    [run] = bbmoe.attack(
        model=TINY_MODEL,
        dataset="tiny",
        trigger="square",
        recipe="paper",
        train={"epochs": 1, "batch_size": 32},
        poison={"rate": 0.25},
        precision="fp32",
        output=tmp_path,
        twin=False,
        observer=bbmoe.LineObserver(sys.stdout),
    )
    assert "epoch 1/1" in capsys.readouterr().out
    assert repr(run).startswith(f"<Run {run.folder.path.name}: finished, BA ") and len(repr(run)) < 200
    html = run._repr_html_()
    ET.fromstring(f"<div>{html}</div>")  # Every tag is closed.
    for key in ("ba", "asr"):
        assert f"({key.upper()})</th><td>{run.value(key):.2f}</td>" in html
    record = replace(run.record, status="failed", error="<script>", metrics={})
    assert "&lt;script&gt;" in Run(run.folder, record)._repr_html_()
    figures = bbmoe.draw_figures(bbmoe.analyze(run, carriers_images=10))
    assert {"history", "routing", "capture", "carriers"} <= figures.keys()
    for name, figure in figures.items():
        assert figure.name == name and ET.fromstring(figure._repr_svg_()).tag.endswith("svg")
        assert figure.png.startswith(b"\x89PNG")
