"""What a run needs and is compared with; and whether it is attacked, which does not hang on a trigger."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_spec

from backdoorbench_moe import attacks
from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.analysis.document import as_document
from backdoorbench_moe.analysis.figures.words import role
from backdoorbench_moe.analysis.report import page
from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.cli.show import read_shown
from backdoorbench_moe.cli.tables.runs import title
from backdoorbench_moe.cli.tables.show_columns import choose_columns
from backdoorbench_moe.config import PartSpec, PoisonSpec, RunSpec, build_spec, spec_from_dict
from backdoorbench_moe.engine.graph import clean_twin, in_order, is_attacked, lineage, needs, reference
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import Runner, run_attack
from backdoorbench_moe.errors import ConfigError, RecordError

TUNING = PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1})


class LabelFlip(Attack):
    """Call every third image the target; no trigger."""

    uses_trigger = False

    def __init__(self, *, poison: PoisonSpec, every: int = 3) -> None:
        super().__init__(poison=poison)
        self.every = every

    def plan(self, labels, num_classes, seed):
        """Every `every`-th image."""
        indices = torch.arange(0, len(labels), self.every)
        return PoisonPlan(indices, torch.full_like(indices, self.poison.target))


@pytest.fixture
def label_flip(monkeypatch) -> RunSpec:
    monkeypatch.setitem(attacks.registry._local, "label-flip", LabelFlip)
    return tiny_spec(attack="label-flip", trigger=None, applicator=None)


def header(run) -> dict[str, str]:
    with safe_open(run.folder.path / "model.safetensors", framework="pt") as opened:
        return opened.metadata()


def test_an_attack_without_a_trigger_marks_its_models(tmp_path, label_flip) -> None:
    [run] = run_attack(label_flip, output=tmp_path)
    assert run.spec.attacked and run.spec.trigger is None and "-label-flip-0.25-" in run.folder.path.name
    assert header(run)["backdoored"] == "true"
    assert run.record.poison == {"rate": 0.25, "n": 32, "target": 0}
    assert run.folder.load_poison().tolist() == list(range(0, 96, 3))
    assert run.value("asr") == run.value("target_rate"), "the images that count are as they were"
    assert run.value("twin_asr") == run.value("twin_target_rate")
    defended = Runner(label_flip, tmp_path).finish(replace(label_flip, defenses=(TUNING,)))
    assert header(defended)["backdoored"] == "true"
    assert header(load_run(tmp_path / run.record.clean_twin))["backdoored"] == "false"


def test_a_model_attacked_without_a_trigger_is_nowhere_called_clean(tmp_path, label_flip) -> None:
    [run] = run_attack(label_flip, output=tmp_path)
    analysis = analyze_run(run)
    assert analysis.findings.capture is None and any(one.part == "capture" for one in analysis.absent)
    document = as_document(analysis)
    assert role(document["run"]) == "backdoored" and role(document["against"]) == "clean"
    text = page(document, [])
    assert "This model is backdoored" in text and "trained on clean data" not in text
    assert title(run.record) == "pmoe on tiny: label-flip"
    [column] = choose_columns(["trigger"], [shown := read_shown(run.folder.path)], intervals=False)
    assert column.value(shown) is None


def test_an_analysis_measures_the_asr_again_that_needs_no_trigger(tmp_path, label_flip) -> None:
    [run] = run_attack(label_flip, output=tmp_path, twin=False)
    run.record.metrics["asr"]["value"] = 100.0 - run.value("asr")
    with pytest.raises(RecordError, match="ASR in its record"):
        analyze_run(run)


def test_options_of_an_attack_are_checked_and_part_of_the_digest(tmp_path, label_flip) -> None:
    spec = replace(label_flip, attack=PartSpec("label-flip", {"every": 4}))
    assert spec.digest != label_flip.digest
    assert spec.to_dict()["attack"] == {"name": "label-flip", "every": 4}
    assert label_flip.to_dict()["attack"] == "label-flip"
    assert spec_from_dict(spec.to_dict()) == spec and spec_from_dict(label_flip.to_dict()) == label_flip
    wrong = replace(label_flip, attack=PartSpec("label-flip", {"evry": 4}))
    with pytest.raises(ConfigError, match=r"option: unknown 'evry'; did you mean 'every'"):
        run_attack(wrong, output=tmp_path)
    with pytest.raises(ConfigError, match="attack: unknown 'label-flop'; did you mean 'label-flip'"):
        run_attack(replace(label_flip, attack=PartSpec("label-flop")), output=tmp_path)


def test_trigger_and_attack_must_go_together(tmp_path, label_flip) -> None:
    stamped = tiny_spec(attack="label-flip")
    with pytest.raises(
        ConfigError, match="trigger: expected no trigger for attack 'label-flip', got 'square'"
    ):
        run_attack(stamped, output=tmp_path)
    with pytest.raises(ConfigError, match="trigger: expected none, as there is no attack, got 'square'"):
        replace(stamped, attack=None)
    with pytest.raises(ConfigError, match=r"poison\.rate: expected 0, as there is no attack, got 0\.25"):
        replace(label_flip, attack=None)


def test_without_a_trigger_the_default_attack_is_none() -> None:
    """So clean runs have been written from the beginning."""
    clean = build_spec({"trigger": None, "applicator": None, "poison": {"rate": 0}})
    assert clean.attack is None and not clean.attacked and clean.to_dict()["attack"] == "data-poisoning"
    assert spec_from_dict(clean.to_dict()) == clean


def test_what_a_run_needs_and_is_compared_with() -> None:
    victim = build_spec({})
    once, twice = (replace(victim, defenses=(TUNING,) * n) for n in (1, 2))
    assert needs(victim) == {} and needs(twice) == {"parent": once} and needs(once) == {"parent": victim}
    assert list(lineage(twice)) == [victim, once, twice]
    clean = clean_twin(victim)
    assert reference(victim) == reference(twice) == clean and reference(clean) is None
    assert in_order([twice, victim]) == [clean, victim, once, twice]
    assert is_attacked(twice) and not is_attacked(clean)


def test_a_defended_clean_run_is_compared_with_the_undefended_one() -> None:
    clean = clean_twin(build_spec({}))
    defended = replace(clean, defenses=(TUNING,))
    assert reference(defended) == clean and in_order([defended]) == [clean, defended]
