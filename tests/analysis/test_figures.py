"""Figures: pixels computed by hand, and sentences that state the numbers of the document."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import document_of

from backdoorbench_moe.analysis.figures import backdoor, maps, mosaic, pixels, routing, training, words
from backdoorbench_moe.analysis.figures.charts import ChartPanel, Series, chart
from backdoorbench_moe.analysis.figures.plate import left_out, spread
from backdoorbench_moe.wording.counting import count


def plates(draw, document) -> dict:
    return {plate.name: plate for plate in draw(document)}


def test_patches_an_expert_does_not_take_are_grey_and_the_others_framed() -> None:
    image = np.full((32, 32, 3), (10, 200, 90), np.uint8)
    # The left half of the 4x4 patches, each of which has 16x16 pixels in the cell.
    picture = mosaic.mark_selected(image, [[1, 1, 0, 0]] * 4)
    assert picture.shape == (64, 64, 4) and (picture[..., 3] == 255).all()
    grey = [round(0.22 * value + 0.78 * 128) for value in (10, 200, 90)]
    assert (picture[:, 32:, :3] == grey).all()
    assert (picture[1:-1, 1:31, :3] == (10, 200, 90)).all()
    for edge in (picture[0, :32], picture[-1, :32], picture[:, 0], picture[:, 31]):
        assert (edge[:, :3] == mosaic.BORDER).all()
    assert (image == (10, 200, 90)).all()


def test_an_image_of_any_size_has_patches_of_whole_pixels() -> None:
    generator = np.random.default_rng(0)
    for side, grid in ((32, 8), (28, 14), (224, 14), (30, 3), (256, 32)):
        image = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        picture = mosaic.mark_selected(image, np.ones((grid, grid), dtype=int).tolist())
        assert picture.shape[0] == picture.shape[1] and picture.shape[0] % grid == 0
        assert 48 <= picture.shape[0] <= 96
        assert picture.shape == mosaic.image_cell(image, (grid, grid)).shape


def test_a_heat_map_runs_from_dark_to_bright_and_missing_values_are_transparent() -> None:
    picture = mosaic.heat_map([0, 0.5, 1, None], (2, 2), 1)
    cells = [picture[y, x] for y in (0, 40) for x in (0, 40)]
    light = [int(cell[:3].sum()) for cell in cells[:3]]
    assert light == sorted(light) and len(set(light)) == 3
    assert [int(cell[3]) for cell in cells] == [255, 255, 255, 0]
    assert (mosaic.heat_map([0.5], (1, 1), 0.5) == mosaic.heat_map([1], (1, 1), 1)).all()


@given(st.integers(0, 60), st.integers(2, 20))
def test_items_to_draw_are_evenly_spread(count, most) -> None:
    chosen = spread(range(count), most)
    assert len(chosen) == min(count, most) and chosen == sorted(set(chosen))
    if count:
        assert chosen[0] == 0 and chosen[-1] == count - 1
    assert bool(left_out(len(chosen), count, "layers")) == (count > most)


def test_words() -> None:
    assert words.listing(["a"]) == "a" and words.listing(["a", "b", "c"]) == "a, b and c"
    assert count(1, "patch") == "1 patch" and count(1200, "patch") == "1,200 patches"
    assert words.mean({"value": 0.12345, "low": None, "high": None}) == "0.123"
    assert words.mean({"value": 0.5, "low": 0.25, "high": 0.75}, factor=100) == "50 [25, 75]"
    assert words.proportion(None) == "–" and words.number(None) == "–"
    assert words.proportion({"value": 50, "low": 40.04, "high": 60}) == "50.0% [40.0, 60.0]"


def test_roles_tell_two_models_apart() -> None:
    document = copy.deepcopy(document_of("dense"))
    assert words.roles(document) == ["backdoored", "clean"]
    for facts in (document["run"], document["against"]):
        facts["record"]["spec"]["defenses"] = [{"name": "a"}]
    assert words.roles(document) == ["this defended", "other defended"]


@pytest.mark.slow
def test_a_map_says_what_the_models_say() -> None:
    document = document_of("pmoe")
    examples = document["examples"]
    for place, plate in enumerate(maps.draw_maps(document)):
        ours, other = examples["models"]
        assert f"class {examples['labels'][place]}: the backdoored model predicts" in plate.sentence
        changed = 0
        for layer, after in zip(ours["clean"]["layers"], ours["triggered"]["layers"], strict=True):
            one, two = (np.array(item["selected"][place]) for item in (layer, after))
            changed += int((one != two).sum())
        assert (
            f"predicts {ours['clean']['predicted'][place]}, and with the trigger "
            f"{ours['triggered']['predicted'][place]} "
            f"(the trigger changes {count(changed, 'selection')} of the experts)"
        ) in plate.sentence
        assert f"the clean model predicts {other['clean']['predicted'][place]}" in plate.sentence


def test_capture_and_carriers_say_the_documents_numbers() -> None:
    document = document_of("pmoe")
    drawn = plates(backdoor.draw_backdoor, document)
    [capture] = document["capture"]
    assert f"in {words.proportion(capture['captured'])}" in drawn["capture"].sentence
    assert f"{capture['blind_captured']:.1f}%" in drawn["capture"].sentence
    carriers = document["carriers"]
    value = min(one["asr"]["value"] for one in carriers["singles"])
    best = next(one for one in carriers["singles"] if one["asr"]["value"] == value)
    whole, lowest = (words.proportion(one["asr"]) for one in (carriers["whole"], best))
    assert (
        f"ASR is {whole} with all experts; the lowest is {lowest}, without {best['experts'][0]}, where BA is "
        in drawn["carriers"].sentence
    )
    pair = min(carriers["pairs"], key=lambda one: one["asr"]["value"])
    assert f"without {pair['experts'][0]} and {pair['experts'][1]}" in drawn["carriers-pairs"].sentence
    patched = min(carriers["patched"], key=lambda one: one["asr"]["value"])
    assert (
        f"reached with {patched['expert']}: {words.proportion(patched['asr'])}" in drawn["patching"].sentence
    )
    [shift] = document["shift"]
    most = max(one["value"] for one in shift["changed_by_expert"])
    assert f"the largest value is {100 * most:.3g} [" in drawn["shift-changed"].sentence


@pytest.mark.parametrize(
    ("caught", "missed", "said"),
    [
        ((90, 80, 95), (10, 5, 20), "the intervals do not overlap"),
        ((50, 30, 70), (40, 20, 60), "the intervals overlap"),
        ((90, 80, 95), None, "every image is captured: ASR 90.0%"),
        (None, (10, 5, 20), "every image is missed: ASR 10.0%"),
    ],
)
def test_whether_capture_predicts_success(caught, missed, said) -> None:
    document = copy.deepcopy(document_of("pmoe"))
    for name, values in (("asr_captured", caught), ("asr_missed", missed)):
        one = None if values is None else dict(zip(("value", "low", "high"), values, strict=True), n=100)
        document["capture"][0][name] = one
    assert said in plates(backdoor.draw_backdoor, document)["capture-success"].sentence


def test_without_a_trigger_muting_is_about_ba_alone() -> None:
    document = copy.deepcopy(document_of("pmoe"))
    document["capture"] = document["shift"] = None
    carriers = document["carriers"]
    carriers |= {"patched": [], "target_rate": None}
    for one in (carriers["whole"], *carriers["singles"], *carriers["pairs"]):
        one["asr"] = None
    drawn = plates(backdoor.draw_backdoor, document)
    assert list(drawn) == ["carriers", "carriers-pairs"]
    assert "ASR" not in "".join(plate.sentence for plate in drawn.values())
    lowest = min(one["ba"]["value"] for one in carriers["singles"])
    assert f"the lowest is {lowest:.1f}%" in drawn["carriers"].sentence


@pytest.mark.parametrize(
    ("auc", "said"),
    [
        (0.52, "brighter patches: AUC 0.520 (rank-biserial correlation +0.04, negligible"),
        (0.36, "darker patches: AUC 0.360 (rank-biserial correlation -0.28, small"),
        (0.7, "rank-biserial correlation +0.40, medium"),
        (0.05, "rank-biserial correlation -0.90, large"),
    ],
)
def test_the_papers_claim_about_pixel_values_is_judged_by_the_largest_effect(auc, said) -> None:
    document = copy.deepcopy(document_of("pmoe"))
    for e, one in enumerate(document["pixels"][0]["overall"]):
        one |= {"auc": auc if e == 2 else 0.5, "rank_biserial": 2 * auc - 1 if e == 2 else 0, "p": 0.0}
    document["run"]["data"] = "cifar10"
    text = pixels.verdict(document)
    assert "expert 2 of moe" in text and said in text and "p below" not in text
    assert ("This agrees with BadPatches" in text) == (abs(2 * auc - 1) < 0.3)


def test_without_any_effect_no_expert_takes_brighter_or_darker_patches() -> None:
    document = copy.deepcopy(document_of("pmoe"))
    for one in document["pixels"][0]["overall"]:
        one |= {"auc": 0.5, "rank_biserial": 0.0}
    assert pixels.verdict(document).startswith("No expert takes brighter or darker patches than the others")


def test_many_lines_differ_in_colour_or_marker() -> None:
    panel = ChartPanel("p", [Series(str(n), [n, n], style="line") for n in range(16)], x=[0, 1])
    axes = chart([panel], xlabel="", ylabel="").axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.get_lines()}) == 16


def test_experts_that_take_all_or_nothing_have_no_pixel_figure_by_class() -> None:
    document = copy.deepcopy(document_of("pmoe"))
    layer = document["pixels"][0]
    layer["overall"] = [None] * 4
    layer["by_class"] = [[None] * 4 for _ in layer["by_class"]]
    drawn = plates(pixels.draw_pixels, document)
    assert list(drawn) == ["pixels"] and "nothing can be compared" in drawn["pixels"].sentence


def test_routing_figures_say_where_patches_go() -> None:
    document = document_of("pmoe")
    drawn = plates(routing.draw_routing, document)
    # Experts of a pMoE take K patches of every image, so there is no load by class.
    assert list(drawn) == ["routing", "routing-by-class", "load", "overlap", "comparison"]
    [layer] = document["routing"]
    frequency = np.array(layer["frequency"])
    e, p = np.unravel_index(frequency.argmax(), frequency.shape)
    assert f"(expert {e}, row {p // 8 + 1}, column {p % 8 + 1})" in drawn["routing"].sentence
    assert (
        f"{100 * layer['takers'][0]:.1f}% of all patches are routed to no expert" in drawn["routing"].sentence
    )
    off = np.array(layer["overlap"])[~np.eye(4, dtype=bool)]
    assert f"from {off.min():.2f}" in drawn["overlap"].sentence
    assert f"to {off.max():.2f}" in drawn["overlap"].sentence
    assert "is 0.0% for the patches" in drawn["load"].sentence


@pytest.mark.slow
def test_a_model_of_many_layers_has_its_load_by_class_and_says_what_is_not_drawn(monkeypatch) -> None:
    document = document_of("deep")
    drawn = plates(routing.draw_routing, document)
    assert "load-by-class" in drawn
    assert "The figure shows 3 of 5 routed layers" in drawn["routing-by-class"].sentence
    assert "The figure shows" not in drawn["load"].sentence
    loads = [sum(row) for layer in document["routing"] for of in layer["by_class"] for row in of]
    assert f"to {max(loads):.1f} (" in drawn["load-by-class"].sentence
    # The caption is about all layers, also if only the first and the last one are drawn.
    monkeypatch.setattr(routing, "MAX_LAYERS", 2)
    document = copy.deepcopy(document)
    row = document["routing"][2]["by_class"][0][0]
    row[:] = [1.0] * len(row)
    drawn = plates(routing.draw_routing, document)
    assert f"to {len(row)}.0 (" in drawn["load-by-class"].sentence


def test_a_probe_is_shown_epoch_by_epoch() -> None:
    document = document_of("pmoe")
    drawn = plates(training.draw_training, document)
    assert list(drawn) == ["history", "probe-settling", "probe-backdoor", "probe-clean", "probe-triggered"]
    [layer] = document["probe"]["layers"]
    assert f"{np.mean(layer['settled'][0]):.2f} before training" in drawn["probe-settling"].sentence
    assert f"fooled {100 * document['probe']['fooled'][-1]:.1f}%" not in drawn["probe-clean"].sentence
    assert f"{100 * document['probe']['fooled'][-1]:.1f}% at the end" in drawn["probe-backdoor"].sentence


def test_experts_that_are_not_drawn_over_training_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(training, "MAX_EXPERTS", 3)
    drawn = plates(training.draw_training, document_of("pmoe"))
    for name in ("probe-settling", "probe-clean", "probe-triggered"):
        assert drawn[name].sentence.endswith("The figure shows 3 of 4 experts; analysis.json contains all.")


def with_a_smaller_layer() -> dict:
    """The document of a model whose second routed layer has two experts instead of four."""

    def smaller(values):
        if isinstance(values, dict):
            return {key: smaller(value) for key, value in values.items()}
        if isinstance(values, list):
            return [smaller(value) for value in (values[:2] if len(values) == 4 else values)]
        return values

    document = copy.deepcopy(document_of("pmoe"))
    models = [model[kind] for model in document["examples"]["models"] for kind in ("clean", "triggered")]
    against = document["findings_against"]
    for layers in (
        *(part[name] for part in (document, against) for name in ("routing", "capture", "shift")),
        *(each["layers"] for each in models),
        document["pixels"],
        document["comparison"]["clean"],
        document["probe"]["layers"],
    ):
        layers.append(smaller(layers[0]) | {"layer": "second"})
    return document


@pytest.mark.parametrize("smaller_first", [False, True])
def test_layers_may_have_different_numbers_of_experts(smaller_first) -> None:
    document = with_a_smaller_layer()
    if smaller_first:
        for layers in (document["routing"], document["findings_against"]["routing"], document["pixels"]):
            layers.reverse()
        document["probe"]["layers"].reverse()
    drawn = plates(routing.draw_routing, document) | plates(pixels.draw_pixels, document)
    drawn |= plates(training.draw_training, document)
    if not smaller_first:
        drawn |= plates(backdoor.draw_backdoor, document) | plates(maps.draw_maps, document)
    assert not any(" experts; analysis.json" in plate.sentence for plate in drawn.values())
    # Both layers are drawn: four titles of experts for the one, two for the other.
    text = drawn["pixels"].svg.decode()
    assert all(f"moe/{e}:" in text for e in range(4)) and "second/1:" in text and "second/2:" not in text


def test_without_a_training_history_there_is_no_figure() -> None:
    document = json.loads(json.dumps(document_of("dense")))
    document["run"]["record"]["history"] = []
    assert list(training.draw_training(document)) == []


def test_bars_have_the_intervals_that_they_were_given() -> None:
    series = Series.of(
        "x", [{"value": 2, "low": 1.5, "high": 3}, None, {"value": 1, "low": None, "high": None}], 10
    )
    assert series.values == [20, None, 10] and series.low == [15, None, None]
    figure = chart([ChartPanel("p", [series], names=["a", "b", "c"])], xlabel="", ylabel="")
    [container] = [one for one in figure.axes[0].containers if hasattr(one, "patches")]
    assert [bar.get_height() for bar in container.patches][::2] == [20, 10]
    segments = container.errorbar.lines[2][0].get_segments()
    assert [float(end) for end in segments[0][:, 1]] == [15, 30]
    assert segments[2][0, 1] == segments[2][1, 1] == 10
