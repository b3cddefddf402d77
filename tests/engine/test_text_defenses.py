"""Mixtures of language models that are defended and analysed, from the run folder to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from defense_tasks import outcome
from toy_texts import Toy, ToyModel, text_spec

import backdoorbench_moe as bbmoe
from backdoorbench_moe import data, defenses, models
from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.analysis.document import as_document, load_document
from backdoorbench_moe.analysis.save import save_analysis
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import run_attack, run_defense
from backdoorbench_moe.errors import ConfigError

pytestmark = pytest.mark.slow

FAST = {
    "align": {"epochs": 4},
    "rasa": {"rounds": 1, "epochs": 4},
    "defensive-expert": {"preference_epochs": 1, "epochs": 4, "gate_epochs": 4},
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The data set and the model by name."""
    parts = {"toy": (data, Toy), "toy-model": (models, ToyModel)}
    for name, (room, part) in parts.items():
        room.registry.register(name)(part)
    yield
    for name, (room, _) in parts.items():
        room.registry.unregister(name)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Run:
    """An attacked mixture, with its benign twin and all that they were made from."""
    [run] = run_attack(text_spec(), output=tmp_path_factory.mktemp("whole") / "runs")
    return run


def defend(run: Run, name: str, output: Path, **options: object) -> Run:
    part = PartSpec(name, {"clean_fraction": 0.25, **FAST[name], **options})
    return run_defense(run, part, output=output)


def test_the_record_counts_what_the_defender_has_of_both_tasks(tmp_path, mixture) -> None:
    run = defend(mixture, "align", tmp_path, clean_fraction=97 / 384)
    assert run.record.data["clean_texts"] == 96


@pytest.mark.parametrize("name", FAST)
def test_a_defense_is_measured_by_what_is_answered_before_and_after_it(tmp_path, mixture, name) -> None:
    run = defend(mixture, name, tmp_path)
    before, *_, last = run.record.stages
    assert run.record.status == "finished" and before["name"] == "before"
    for metric in ("ba", "asr", "unsafe", "task/0.ba", "task/1.ba"):
        assert before["metrics"][metric] == mixture.record.metrics[metric], metric
    assert before["metrics"]["asr"]["value"] >= 50 and last["metrics"]["asr"]["n"] == 40
    assert "ra" not in last["metrics"] and {"ba", "asr", "unsafe", "overall"} <= run.record.metrics.keys()
    # A quarter of 384 training texts.
    assert run.record.data["clean_texts"] == 96 and "clean_images" not in run.record.data
    assert run.record.gate_shares and run.record.is_text
    if name != "defensive-expert":
        assert run.value("unsafe") <= 10 and run.value("ba") >= 80
    else:
        [judged] = run.record.judgements
        assert judged["about"] == "expert" and judged["details"] == {"defensive": 1}
        # The poisoned expert alone does not refuse, the other one does.
        assert judged["scores"]["0"] > 50 > judged["scores"]["1"]


def test_the_same_command_gives_the_same_numbers_and_a_defended_mixture_can_be_defended(
    tmp_path, mixture
) -> None:
    one, other = (defend(mixture, "rasa", tmp_path / each) for each in ("one", "other"))
    assert outcome(one) == outcome(other)
    again = defend(one, "align", tmp_path, scope="gates+experts", layers="all")
    assert again.record.stages[0]["metrics"]["unsafe"] == one.record.metrics["unsafe"]


@pytest.mark.parametrize(
    "name", [name for name in defenses.registry.names() if not defenses.registry.lookup(name).takes_texts]
)
def test_every_other_defense_says_that_it_is_for_images(tmp_path, mixture, name) -> None:
    with pytest.raises(ConfigError) as caught:
        run_defense(mixture, PartSpec(name, {}), output=tmp_path)
    assert "this defense is for images" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_policy_or_mixture_cannot_be_aligned(tmp_path) -> None:
    for values, message in (
        (
            {"attack": None, "policy": 0, "mixture": {"poisoned_experts": []}},
            "needs refused queries with a safe answer",
        ),
        (
            {"attack": None, "mixture": None, "gate": None},
            "expected a mixture of merged experts, got ToyModel",
        ),
    ):
        spec = text_spec(**values, defenses=[{"name": "align"}])
        with pytest.raises(ConfigError, match=message):
            run_attack(spec, output=tmp_path / "runs")


def test_the_analysis_of_an_attacked_mixture(tmp_path, mixture) -> None:
    """Expert 0 is poisoned: harmful queries look to it like its task's, and without it they are not answered."""
    found = analyze_run(mixture)
    twin = load_run(mixture.folder.path.parent / mixture.record.clean_twin)
    for shares, run in ((found.experts.shares, mixture), (found.experts.shares_against, twin)):
        for layer, known in zip(shares.layers, run.record.gate_shares, strict=True):
            assert layer.layer == known["layer"] and layer.unmarked is None
            assert layer.tasks.tolist() == [pytest.approx(row, abs=1e-3) for row in known["tasks"]]
            assert layer.marked.tolist() == pytest.approx(known["marked"], abs=1e-3)
    [own] = found.latents
    cosines = {model.model: model.layers[-1].marked for model in own.models}
    assert own.expert == 0 and cosines["poisoned expert"] > cosines["benign expert"]
    assert own.models[0].layers[0].unmarked is None
    carriers = found.carriers
    assert carriers.whole.asr.value == mixture.value("asr") and carriers.whole.unsafe.n == 40
    assert carriers.whole.ba.n == 80 and not carriers.singles
    for change in ("muted", "patched"):
        harmful = [getattr(one, change).asr.value for one in carriers.whole_experts]
        assert harmful[0] < harmful[1], f"without the poisoned expert, {change}"
    assert carriers.whole_experts[0].patched.ra is None
    assert {one.kind for one in found.answers} == {"copy", "turn", "harmful query"}
    assert {one.part for one in found.absent} == {"patch maps", "routing", "capture", "shift", "pixels"}
    file, page = save_analysis(found, tmp_path)
    assert load_document(file) == json.loads(json.dumps(as_document(found)))
    text = page.read_text()
    for words in ("80 test queries", "40 harmful ones", "harmful queries", "Example answers", "mean output"):
        assert words in text
    for words in ("marked images", "unmarked", "triggered"):
        assert words not in text


def test_a_smaller_sample_is_measured_with_experts_muted(mixture) -> None:
    found = analyze_run(mixture, carriers_images=10)
    assert found.carriers.whole.ba.n == found.carriers.whole.asr.n == 10


def test_the_analysis_of_other_runs_on_texts(tmp_path, mixture) -> None:
    """The benign mixture, the base, a poisoned expert and a defended mixture."""
    runs = {path.name: path for path in mixture.folder.path.parent.iterdir()}

    def named(part: str) -> Run:
        [path] = (path for name, path in runs.items() if part in name)
        return load_run(path)

    benign = analyze_run(named("moe2-top-k-clean"))
    assert benign.latents is None and benign.carriers.whole.asr is None
    assert benign.carriers.whole_experts[0].patched.asr is None and benign.answers[0].answer_against is None
    base = analyze_run(named("policy-clean"))
    assert base.experts is base.carriers is None and {"experts", "carriers"} <= {
        one.part for one in base.absent
    }
    expert = analyze_run(named("expert0-moevil"))
    assert [model.model for model in expert.latents[0].models] == ["benign expert", "poisoned expert"]
    defended = analyze_run(defend(mixture, "align", mixture.folder.path.parent))
    assert defended.against is not None and len(defended.latents[0].models) == 4
    for number, found in enumerate((benign, base, expert, defended)):
        save_analysis(found, tmp_path / str(number))


def test_example_images_are_refused(mixture) -> None:
    with pytest.raises(ConfigError, match=r"^images: expected none, as the data are texts$"):
        bbmoe.analyze(mixture, images=[1])
