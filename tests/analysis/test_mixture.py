"""The analysis of mixtures: gate shares and latents by hand, experts in all layers, and every kind of run."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_parts import make_dense, make_merged, tuned
from mixture_runs import make_mixture
from routed_models import make_triggered, open_with_model
from tiny import Tiny
from torch import Tensor, nn

from backdoorbench_moe import data
from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.analysis.carriers import find_carriers
from backdoorbench_moe.analysis.document import as_document
from backdoorbench_moe.analysis.figures.mixture import draw_experts
from backdoorbench_moe.analysis.figures.words import proportion
from backdoorbench_moe.analysis.gate_shares import model_shares
from backdoorbench_moe.analysis.latents import mean_directions
from backdoorbench_moe.analysis.report import draw_report
from backdoorbench_moe.analysis.results import Analysis
from backdoorbench_moe.engine.inference import logits, predict
from backdoorbench_moe.engine.measuring.mixtures import MixturePass, RoutedPass
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.gates import create_gate
from backdoorbench_moe.moe.experts import mute
from backdoorbench_moe.moe.merging import MergedModel, load_experts, mlp_inputs


def passed(*weights: list[list[float]]) -> RoutedPass:
    """A pass with given weights, (N, E) for each layer."""
    values = torch.tensor(weights)
    layers = tuple("ab"[: len(weights)])
    return RoutedPass(predicted=torch.zeros(values.shape[1]), weights=values, layers=layers)


def test_gate_shares_by_hand() -> None:
    """Two layers, two experts; two images of task 0, one of task 1, and two marked ones."""
    found = MixturePass(
        tasks=[
            passed([[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.8], [0.4, 0.6]]),
            passed([[0.1, 0.9]], [[0.3, 0.7]]),
        ],
        marked=passed([[0.6, 0.4], [0.8, 0.2]], [[1.0, 0.0], [0.0, 1.0]]),
        unmarked=None,
    )
    shares = model_shares(found)
    first, second = shares.layers
    assert (first.layer, second.layer) == ("a", "b") and first.unmarked is None
    torch.testing.assert_close(first.tasks, torch.tensor([[75.0, 25.0], [10.0, 90.0]]).double())
    torch.testing.assert_close(second.tasks, torch.tensor([[30.0, 70.0], [30.0, 70.0]]).double())
    torch.testing.assert_close(first.marked, torch.tensor([70.0, 30.0]).double())
    torch.testing.assert_close(second.marked, torch.tensor([50.0, 50.0]).double())
    # Expert 0 on its own task: images (1 + 0.2) / 2 and (0.5 + 0.4) / 2; expert 1: (0.9 + 0.7) / 2.
    assert [one.value for one in shares.own] == pytest.approx([52.5, 80.0])
    assert [one.n for one in shares.own] == [2, 1]
    assert shares.marked is not None
    assert [one.value for one in shares.marked] == pytest.approx([60.0, 40.0])


class Colours(nn.Module):
    """A dense model whose only MLP gets the colours of the pixels."""

    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)
        self.mlp.forward = lambda x: x  # type: ignore[method-assign]

    def mlps(self) -> dict[str, nn.Module]:
        return {"mlp": self.mlp}

    def token_layout(self) -> tuple[tuple[int, int], int]:
        return (2, 2), 0

    def forward(self, images: Tensor) -> Tensor:
        return self.mlp(images.flatten(2).transpose(1, 2)).mean(1)


def test_cosines_by_hand() -> None:
    """One colour each: red against yellow is 1 / sqrt(2), against blue 0; the length of a latent does not count."""
    red, dark_red, yellow, blue = ((255, 0, 0), (51, 0, 0), (255, 255, 0), (0, 0, 255))

    def images(*colours: tuple[int, int, int]) -> Tensor:
        return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2)

    first, second = (
        mean_directions(Colours(), each, precision="fp32")["mlp"]
        for each in (images(red, dark_red), images(yellow, blue))
    )
    torch.testing.assert_close(first, torch.tensor([1.0, 0, 0]).double())
    assert (first @ second).item() == pytest.approx((0.5**0.5 + 0) / 2)


def test_cosines_are_means_over_all_pairs() -> None:
    model, images = make_dense(), Tiny().load().test.images
    one, other = images[:7], images[7:20]
    found = [mean_directions(model, each, precision="fp32") for each in (one, other)]
    with torch.no_grad(), mlp_inputs(model) as inputs:
        model(torch.cat([one, other]).float() / 255)
    for name, tokens in inputs.items():
        latents = tokens.double().mean(1)
        pairs = nn.functional.cosine_similarity(latents[:7, None], latents[None, 7:], dim=2)
        assert (found[0][name] @ found[1][name]).item() == pytest.approx(pairs.mean().item(), abs=1e-6)


def test_whole_experts_equal_muted_copies() -> None:
    merged, _, _ = make_merged(experts=3)
    opened = open_with_model(merged)
    triggered, test = make_triggered(opened), opened.images.test
    safe = triggered.true.roll(1)
    found = find_carriers(opened, triggered, 1000, safe=safe)
    assert [one.expert for one in found.whole_experts] == [0, 1, 2]
    for one in found.whole_experts:
        model = copy.deepcopy(opened.model)
        mute(model, [each for each in model.experts() if each.index == one.expert])
        called, answered = (
            predict(model, each, precision="fp32") for each in (test.images, triggered.images)
        )
        assert one.muted.experts == tuple(f"network.blocks.{n}.mlp/{one.expert}" for n in range(2))
        assert one.muted.ba.value == pytest.approx(100 * (called == test.labels).double().mean().item())
        assert one.muted.asr is not None and one.muted.unsafe is not None and one.patched is not None
        hits = (answered == triggered.wanted, answered != safe)
        values = [one.muted.asr.value, one.muted.unsafe.value]
        assert values == pytest.approx([100 * each.double().mean().item() for each in hits])
        assert one.patched.unsafe is not None and one.patched.unsafe.n == len(triggered)
    assert found.whole.unsafe is not None and find_carriers(opened, None, 5).whole_experts[0].patched is None


def test_in_a_single_layer_a_whole_expert_is_an_expert() -> None:
    base = make_dense(depth=1)
    merged = MergedModel(base, 2, create_gate("soft"))
    load_experts(merged, base.state_dict(), [tuned(base, 1), tuned(base, 2)])
    opened = open_with_model(merged)
    found = find_carriers(opened, make_triggered(opened), 1000)
    assert tuple(one.muted for one in found.whole_experts) == found.singles
    for one, single in zip(found.whole_experts, found.patched, strict=True):
        assert one.patched is not None and (one.patched.asr, one.patched.ra) == (single.asr, single.ra)


def test_with_drawn_experts_all_results_are_of_the_same_draws() -> None:
    """Muting an expert that no gate draws changes nothing; with other draws the answers would differ."""
    base = make_dense()
    merged = MergedModel(base, 4, create_gate("sample-top1"))
    load_experts(merged, base.state_dict(), [tuned(base, seed) for seed in range(4)])
    with torch.no_grad():
        for mlp in merged.layers():
            mlp.mask_expert(3)
            mlp.experts.fc2.weight.mul_(4)
    opened = open_with_model(merged)
    with torch.no_grad():
        # So that no class is answered everywhere.
        merged.network.head.bias -= logits(merged, opened.images.test.images, precision="fp32").mean(0)
    draws = [predict(merged, opened.images.test.images, precision="fp32") for _ in range(2)]
    assert not torch.equal(*draws)
    triggered = make_triggered(opened)
    found = find_carriers(opened, triggered, 1000)
    idle = found.whole_experts[3]
    assert (idle.muted.ba, idle.muted.asr) == (found.whole.ba, found.whole.asr)
    assert idle.patched is not None and idle.patched.asr == found.whole.asr
    assert find_carriers(opened, triggered, 1000) == found


@functools.cache
def made(gate: str = "top-k") -> tuple[dict[str, Any], dict[str, Analysis], tempfile.TemporaryDirectory[str]]:
    """The runs of a tiny mixture and their analyses. Do not change them."""
    data.registry.register("tiny")(Tiny)
    try:
        folder = tempfile.TemporaryDirectory()
        options = {} if gate == "top-k" else {"gate": {"name": gate}}
        runs = make_mixture(Path(folder.name), **options)
        kinds = ("mixture", "twin") if gate == "top-k" else ("mixture",)
        return runs, {kind: analyze_run(runs[kind], carriers_images=20) for kind in kinds}, folder
    finally:
        data.registry.unregister("tiny")


@pytest.fixture
def made_again(tiny):
    """`made`, for a process in which the data set is registered already."""
    data.registry.unregister("tiny")
    try:
        yield made
    finally:
        data.registry.register("tiny")(Tiny)


@pytest.mark.slow
def test_the_shares_are_those_of_the_records(made_again) -> None:
    runs, analyses, _ = made_again()
    found = analyses["mixture"].experts
    assert found is not None and found.tasks == ("rotated", "inverted") and found.poisoned == (0,)
    record, twin = runs["mixture"].record, runs["twin"].record
    assert found.shares_against is not None
    for shares, known in ((found.shares, record.gate_shares), (found.shares_against, twin.gate_shares)):
        for layer, values in zip(shares.layers, known, strict=True):
            assert layer.layer == values["layer"]
            torch.testing.assert_close(layer.tasks.float(), torch.tensor(values["tasks"]))
    assert found.shares.marked is not None and found.shares_against.marked is not None
    assert found.shares.marked[0].value == pytest.approx(record.metrics["harm_share"]["value"])
    assert found.shares.own[0].value == pytest.approx(record.metrics["own_share"]["value"])
    assert found.shares_against.marked[0].value == pytest.approx(record.metrics["twin_harm_share"]["value"])
    # Of the benign mixture alone, all test images bear the mark.
    benign = analyses["twin"]
    assert benign.experts is not None and benign.experts.poisoned == () and benign.latents is None
    assert benign.findings.capture is None and benign.images.triggered == 0
    assert benign.experts.shares.marked is not None and benign.experts.shares.marked[0].n == 60


@pytest.mark.slow
def test_the_latents_before_and_after(made_again) -> None:
    runs, analyses, _ = made_again()
    [found] = analyses["mixture"].latents or ()
    names = ["benign expert", "poisoned expert", "mixture", "compared mixture"]
    assert found.expert == 0 and [one.model for one in found.models] == names
    assert found.models[1].run == runs["expert/0"].folder.path.name
    first = [one.layers[0] for one in found.models]
    # The input of the first MLP does not depend on any MLP.
    assert {round(one.marked, 5) for one in first} == {round(first[0].marked, 5)}
    assert found.models[0].layers[1].marked != found.models[1].layers[1].marked
    assert [layer.layer for layer in found.models[2].layers] == ["blocks.0.mlp", "blocks.1.mlp"]


@pytest.mark.slow
def test_the_report_of_a_mixture(made_again) -> None:
    _, analyses, _ = made_again()
    attacked, benign = (as_document(analyses[kind]) for kind in ("mixture", "twin"))
    drawn = {plate.name: plate for plate in draw_experts(attacked)}
    assert list(drawn) == ["gate-shares", "gate-shares-by-task", "latents", "whole-experts"]
    muted = [proportion(one["muted"]["asr"]) for one in attacked["carriers"]["whole_experts"]]
    best = min(range(2), key=lambda e: attacked["carriers"]["whole_experts"][e]["muted"]["asr"]["value"])
    assert f"; the lowest is {muted[best]}, with expert {best} muted." in drawn["whole-experts"].sentence
    assert [plate.name for plate in draw_experts(benign)] == ["gate-shares-by-task", "whole-experts"]
    page = draw_report(attacked).page
    own = attacked["experts"]["shares"]["own"][0]["value"]
    assert "Poisoned expert 0:" in page and f"{own:.1f}% for its own task" in page
    assert "Mean cosine with the latents of task 0" in page and "0 rotated, poisoned" in page


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["soft", "sample-top1"])
def test_other_gates(made_again, gate) -> None:
    """With drawn experts, the draws of the check are those of the run."""
    _, analyses, _ = made_again(gate)
    found = analyses["mixture"]
    assert found.experts is not None and found.findings.routing is not None
    assert draw_report(as_document(found)).figures
    if gate == "soft":
        assert found.findings.routing[0].load.tolist() == [64, 64]


@pytest.mark.slow
def test_experts_and_base_are_measured_on_their_tasks_again(made_again) -> None:
    """Each is compared with its record, and a wrong record is found."""
    runs, _, _ = made_again()
    data.registry.register("tiny")(Tiny)
    try:
        for kind in ("mixture", "base", "expert/0", "expert/1"):
            run = load_run(runs[kind].folder.path)
            if kind != "mixture":
                found = analyze_run(run, carriers_images=5)
                assert found.experts is None and (found.latents is None) == (kind != "expert/0")
            run.record.metrics["ba"]["value"] += 30
            with pytest.raises(RecordError, match="BA in its record"):
                analyze_run(run, carriers_images=5)
    finally:
        data.registry.unregister("tiny")


@pytest.mark.slow
def test_without_the_folder_of_the_benign_expert_the_latents_are_missing(made_again, tmp_path) -> None:
    runs, _, folder = made_again()
    shutil.copytree(folder.name, tmp_path / "runs")
    [benign] = [each["run"] for each in runs["expert/0"].record.inputs]
    shutil.rmtree(tmp_path / "runs" / benign)
    run = load_run(tmp_path / "runs" / runs["mixture"].folder.path.name)
    data.registry.register("tiny")(Tiny)
    try:
        found = analyze_run(run, carriers_images=5)
    finally:
        data.registry.unregister("tiny")
    [reason] = [one.reason for one in found.absent if one.part == "latents"]
    assert found.latents is None and reason.startswith(f"{benign}, the run 'benign' of")
