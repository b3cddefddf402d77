"""Input filters: what they are shown, how they are measured, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from defense_tasks import defended_spec, outcome, used_model
from scipy.stats import mannwhitneyu
from tiny import Tiny, tiny_spec
from torch import Tensor, nn

from backdoorbench_moe import defenses
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.graph import clean_twin, needs
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.measuring import filtering
from backdoorbench_moe.engine.measuring.filtering import measure_filtered
from backdoorbench_moe.engine.poisoning.triggered import Triggered, triggered_test
from backdoorbench_moe.engine.runner import Runner, run_defense
from backdoorbench_moe.errors import PluginError

STRIP = {"name": "routing-strip", "clean_fraction": 0.5, "blends": 4, "fpr": 0.1}


@pytest.fixture
def offer(monkeypatch):
    """Offer a defense under a name for the test."""
    return lambda name, part: monkeypatch.setitem(defenses.registry._local, name, part)


class Constant(nn.Module):
    """Calls an image what its first pixel says."""

    def forward(self, images: Tensor) -> Tensor:
        """One-hot logits."""
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 3).float()


def table(rows: list[tuple[int, int, int]]) -> Split:
    """Images of (prediction, label, score)."""
    images = torch.zeros(len(rows), 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([row[0] for row in rows])
    images[:, 1, 0, 0] = torch.tensor([row[2] for row in rows])
    return Split(images, torch.tensor([row[1] for row in rows]))


def wanting(split: Split) -> Triggered:
    """These images as triggered ones that are to be called 0."""
    places = torch.arange(len(split))
    return Triggered(places, split.images, torch.zeros_like(split.labels), split.labels)


def measure(test: Split, triggered: Triggered | None, judge, threshold: float, *, seed: int = 1, safe=None):
    judgement = Judgement("input", "its score is high", threshold=threshold, judge=judge)
    return measure_filtered(Constant(), test, triggered, judgement, seed=seed, precision="fp32", safe=safe)


def score(images: Tensor) -> Tensor:
    return images[:, 1, 0, 0].float()


def test_the_metrics_of_a_table_by_hand() -> None:
    """Rejected is a score above 5. Clean: right and kept, right and rejected, wrong, kept at 5 exactly.

    Triggered, target 0: fooled and kept, fooled and rejected, seen through and kept, seen through but rejected,
    something else. Pairs of a triggered and a clean score in order: of the scores 1, 9, 6, 8, 2 against
    3, 7, 1, 5 they are 0.5, 4, 3, 4 and 1 of 4 each.
    """
    test = table([(1, 1, 3), (2, 2, 7), (0, 1, 1), (0, 0, 5)])
    triggered = wanting(table([(0, 1, 1), (0, 2, 9), (2, 2, 6), (1, 1, 8), (2, 1, 2)]))
    found = measure(test, triggered, score, 5.0)
    values = {name: metric["value"] for name, metric in found.items()}
    assert values == pytest.approx(
        {"ba": 50.0, "asr": 20.0, "ra": 0.0, "tpr": 60.0, "fpr": 25.0, "auroc": 100 * 12.5 / 20}
    )
    assert {name: metric["n"] for name, metric in found.items()} == {
        **{"ba": 4, "asr": 5, "ra": 5, "tpr": 5, "fpr": 4, "auroc": 9}
    }
    equal = measure(test, triggered, score, 6.0)["ra"]["value"]
    assert equal == pytest.approx(20.0), "a score equal to the threshold is not suspicious"
    # Rejected images are safe: of the two that are kept, 0 is answered safely, and 2 is not.
    safe = measure(test, triggered, score, 5.0, safe=torch.tensor([0, 1, 1, 2, 1]))
    assert safe["unsafe"]["value"] == pytest.approx(20.0) and safe.keys() - found.keys() == {"unsafe"}
    alone = measure(test, None, score, 5.0)
    assert alone == {name: found[name] for name in ("ba", "fpr")}


def test_the_clean_accuracy_of_a_mixture_is_the_mean_over_its_tasks() -> None:
    """Of 6 images of one task, 3 are right and kept; of 2 of the other, both: 75%, and not 5 of 8."""
    test = table([(1, 1, 3), (2, 2, 7), (0, 0, 5), (2, 2, 1), (0, 1, 1), (0, 2, 9), (0, 0, 0), (1, 1, 2)])
    judgement = Judgement("input", "its score is high", threshold=5.0, judge=score)
    given = {"seed": 1, "precision": "fp32"}
    found = measure_filtered(Constant(), test, None, judgement, tasks=[6, 2], **given)
    assert found["ba"]["value"] == pytest.approx(75.0) and found["ba"]["n"] == 8
    pooled = measure_filtered(Constant(), test, None, judgement, **given)
    assert pooled["ba"]["value"] == pytest.approx(62.5) and pooled["fpr"] == found["fpr"]


def test_a_filter_is_shown_images_alone_in_one_shuffled_row(monkeypatch) -> None:
    """Neither the batch nor the place in it tells clean from triggered, and no batch is of one kind."""
    monkeypatch.setattr(filtering, "batch_size_for", lambda _: 64)
    clean, images = table([(0, 0, 0)] * 300), table([(0, 1, 1)] * 200)
    seen: list[Tensor] = []

    def judge(*arguments: object, **named: object) -> Tensor:
        [shown] = arguments
        assert not named and isinstance(shown, Tensor) and shown.dtype == torch.uint8
        seen.append(score(shown))
        found = score(shown)
        shown.zero_()
        return found

    both = clean, wanting(images)
    found = measure(*both, judge, 0.5)
    assert [len(part) for part in seen] == [64] * 7 + [52]
    assert all(10 < part.sum() < len(part) - 10 for part in seen)
    assert found["tpr"]["value"] == 100 and found["fpr"]["value"] == 0, "and scores come back in their places"
    assert (images.images[:, 1, 0, 0] == 1).all(), "it was shown a copy"
    order = torch.cat(seen)
    seen.clear()
    measure(*both, judge, 0.5)
    assert torch.equal(torch.cat(seen), order)
    seen.clear()
    measure(*both, judge, 0.5, seed=2)
    assert not torch.equal(torch.cat(seen), order)


def test_it_is_measured_on_a_sample_of_each_kind(monkeypatch) -> None:
    monkeypatch.setattr(filtering, "IMAGES", 20)
    clean, images = (table([(0, 0, n) for n in range(100)]), table([(0, 1, 100 + n) for n in range(50)]))
    shown: set[int] = set()

    def judge(batch: Tensor) -> Tensor:
        shown.update(batch[:, 1, 0, 0].tolist())
        return score(batch)

    found = measure(clean, wanting(images), judge, 99.5)
    assert found["fpr"]["n"] == found["tpr"]["n"] == 20 and found["auroc"]["n"] == 40
    assert sum(number < 100 for number in shown) == 20 == sum(number >= 100 for number in shown)
    assert shown - set(range(20)) - set(range(100, 120)), "not the first ones"


def test_safe_answers_go_with_the_images_that_are_drawn(monkeypatch) -> None:
    """Of 50 triggered images 20 are drawn. All but the first 20 of the 50 are answered safely."""
    monkeypatch.setattr(filtering, "IMAGES", 20)
    images = table([(1, 2, n) for n in range(50)])
    shown: set[int] = set()

    def judge(batch: Tensor) -> Tensor:
        shown.update(batch[:, 1, 0, 0].tolist())
        return torch.zeros(len(batch))

    safe = torch.tensor([2] * 20 + [1] * 30)
    found = measure(table([(0, 0, 200)]), wanting(images), judge, 0.5, safe=safe)
    first = sum(number < 20 for number in shown)
    assert 0 < first < 20 and found["unsafe"]["value"] == pytest.approx(100 * first / 20)


def nan_once(images: Tensor) -> Tensor:
    """Scores of which the first is not a number."""
    return torch.tensor([torch.nan, *[0.0] * (len(images) - 1)])


BAD = {
    "too few": (lambda images: torch.zeros(len(images) - 1), r"\(3,\), 3 of them finite"),
    "a column": (lambda images: torch.zeros(len(images), 1), r"\(4, 1\), 4 of them finite"),
    "one not a number": (nan_once, r"\(4,\), 3 of them finite"),
    "a list": (lambda images: [0.0] * len(images), r"\[0.0, 0.0, 0.0, 0.0\]"),
}


@pytest.mark.parametrize(("judge", "got"), BAD.values(), ids=BAD.keys())
def test_scores_that_are_none_are_refused(judge, got) -> None:
    with pytest.raises(PluginError, match=f"filter: expected a finite score for each of 4 images, got {got}"):
        measure(table([(0, 0, 0)] * 4), None, judge, 0.5)


class Half(Defense):
    """A filter without a threshold, or with one that is none."""

    def __init__(self, *, at: str = "", clean_fraction: float = 0.5) -> None:
        super().__init__(clean_fraction=clean_fraction)
        self.at = float(at) if at else None

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Filter nothing."""
        return DefenseResult(
            "filtered", task.model, (Judgement("input", "high", threshold=self.at, judge=score),)
        )


@pytest.mark.parametrize("at", ["", "nan", "inf"])
def test_a_filter_without_a_threshold_is_a_fault_of_the_defense(tmp_path, offer, at) -> None:
    offer("half", Half)
    [parent] = [Runner(tiny_spec(), tmp_path).finish(tiny_spec())]
    with pytest.raises(PluginError, match="threshold: expected a finite number"):
        run_defense(parent, PartSpec("half", {"at": at}))


class Nan(Half):
    """A filter whose scores are not numbers."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Filter nothing."""
        judge = Judgement("input", "high", threshold=0.5, judge=nan_once)
        return DefenseResult("filtered", task.model, (judge,))


def test_a_filter_without_scores_is_a_fault_of_the_named_defense(tmp_path, offer) -> None:
    offer("nan", Nan)
    [parent] = [Runner(tiny_spec(), tmp_path).finish(tiny_spec())]
    with pytest.raises(PluginError, match=r"^defense 'nan': filter: expected a finite score"):
        run_defense(parent, PartSpec("nan", {}))


@pytest.mark.slow
def test_a_filtered_run_is_measured_from_the_record_alone(tmp_path) -> None:
    spec = defended_spec(STRIP)
    run = Runner(spec, tmp_path).attack(spec)
    record = json.loads((run.folder.path / "record.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["before", "filtered"]
    last = record["stages"][1]["metrics"]
    assert set(last) == {"ba", "asr", "ra", "auroc", "tpr", "fpr"}
    assert {name: last[name]["n"] for name in last} == {
        **{"ba": 60, "fpr": 60, "asr": 40, "ra": 40, "tpr": 40, "auroc": 100}
    }
    assert {name: record["metrics"][name] for name in last} == last and "cad" in record["metrics"]
    for metric in last.values():
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 100
    parent = Runner(spec, tmp_path).finish(needs(spec)["parent"])
    tensors, before = run.folder.load_tensors()[0], parent.folder.load_tensors()[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    # The same numbers, from the filter of a second run and an own count.
    images, kept = Tiny().load(), {}
    result = None

    class Keeping(type(defenses.create_defense("routing-strip"))):
        def defend(self, task):
            nonlocal result
            result = super().defend(task)
            return result

    defenses.registry._local["routing-strip"] = Keeping
    try:
        again = Runner(spec, tmp_path / "again").finish(spec)
    finally:
        del defenses.registry._local["routing-strip"]
    assert outcome(again)[1:] == outcome(run)[1:]
    triggered = triggered_test(images, run.attack(), run.stamper())
    model = run.model()
    for name, shown in (("clean", images.test.images), ("triggered", triggered.images)):
        kept[name] = result.filter.judge(shown).numpy()
        kept[f"{name} called"] = predict(model, shown, precision="fp32").numpy()
    passed = {name: kept[name] <= result.filter.threshold for name in ("clean", "triggered")}
    u = mannwhitneyu(kept["triggered"], kept["clean"]).statistic
    expected = {
        "auroc": u / 2400,
        "tpr": 1 - passed["triggered"].mean(),
        "fpr": 1 - passed["clean"].mean(),
        "ba": ((kept["clean called"] == images.test.labels.numpy()) & passed["clean"]).mean(),
        "asr": ((kept["triggered called"] == 0) & passed["triggered"]).mean(),
        "ra": ((kept["triggered called"] == triggered.true.numpy()) & passed["triggered"]).mean(),
    }
    assert {name: last[name]["value"] for name in last} == pytest.approx(
        {name: 100 * value for name, value in expected.items()}
    )


def test_a_clean_run_has_the_false_positive_rate_alone(tmp_path) -> None:
    part = PartSpec("strip", {key: value for key, value in STRIP.items() if key != "name"})
    spec = replace(clean_twin(tiny_spec()), defenses=(part,))
    run = Runner(spec, tmp_path).attack(spec)
    assert set(run.record.metrics) == {"ba", "fpr", "cad"}, "what the filter costs a clean model"


@pytest.mark.parametrize("called", [0, 1, 2])
def test_a_filter_of_a_model_of_its_own_is_not_run_on_another(tmp_path, offer, called) -> None:
    """The engine measures behind the model that came back, not the one that went in, which cannot do all three."""

    class Bent(Half):
        def defend(self, task: DefenseTask) -> DefenseResult:
            """Always say the same class."""
            with torch.no_grad():
                task.model.head.bias[called] += 1e6
            judged = Judgement("input", "never", threshold=1.0, judge=lambda images: torch.zeros(len(images)))
            return DefenseResult("filtered", task.model, (judged,))

    offer("bent", Bent)
    spec = defended_spec({"name": "bent"})
    run = Runner(spec, tmp_path).finish(spec)
    after = {name: metric["value"] for name, metric in run.record.stages[-1]["metrics"].items()}
    fooled, right = (100, 0) if called == 0 else (0, 50)
    assert (after["ba"], after["asr"], after["ra"]) == pytest.approx((100 / 3, fooled, right))
    assert after["auroc"] == 50
    assert used_model().head.bias.abs().max() < 1e6
