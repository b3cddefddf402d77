"""Figures of trigger capture, routing shift, and BA and ASR with experts muted and patched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backdoorbench_moe.analysis.figures.charts import ChartPanel, Series, chart, matrices
from backdoorbench_moe.analysis.figures.plate import MAX_LAYERS, Doc, Plate, left_out, make_plate, spread
from backdoorbench_moe.analysis.figures.words import listing, mean, number, percent, proportion, roles
from backdoorbench_moe.wording.counting import count


def draw_backdoor(document: Doc) -> Iterator[Plate]:
    """Draw the figures of capture, shift and carriers; parts that the document does not contain are skipped."""
    if document["capture"] is not None:
        yield _capture(document)
        yield _success(document)
    if document["shift"] is not None:
        yield _divergence(document)
        yield _changed(document)
    if (carriers := document["carriers"]) is not None and carriers["singles"]:
        yield _muted(document)
        if carriers["patched"]:
            yield _patched(document)
        if carriers["pairs"]:
            yield _pairs(document)


def _others(document: Doc, part: str) -> list[Doc] | None:
    """Return the same part of the findings for the other model; None without one."""
    against = document["findings_against"]
    return None if against is None else against[part]


def _names(values: list[Any]) -> list[str]:
    return [str(place) for place in range(len(values))]


def _capture(document: Doc) -> Plate:
    layers, others = document["capture"], _others(document, "capture")
    shown = spread(range(len(layers)), MAX_LAYERS)
    panels = []
    for place in shown:
        layer = layers[place]
        series = [Series(roles(document)[0], _percents(layer["by_expert"]))]
        if others is not None:
            series.append(Series(roles(document)[1], _percents(others[place]["by_expert"])))
        series.append(Series("blind routing", _percents(layer["blind_by_expert"]), style="mark"))
        panels.append(ChartPanel(f"layer {layer['layer']}", series, names=_names(layer["by_expert"])))
    first = max(layers, key=lambda layer: abs(layer["captured"]["value"] - layer["blind_captured"]))
    said = (
        f"Share of triggered images in which an expert receives a patch that the trigger changed. The trigger changes "
        f"{mean(first['changed_patches'])} of the {len(first['changed'])} patches of an image. In layer "
        f"{first['layer']}, at least one expert receives such a patch in {proportion(first['captured'])} of the "
        f"images, compared with {percent(first['blind_captured'])} under blind routing (the same routing of shuffled "
        f"patches); on average {mean(first['experts'])} experts do, compared with {number(first['blind_experts'])}."
    )
    if others is not None:
        other = others[layers.index(first)]
        said += f" In the {roles(document)[1]} model, at least one expert does in {proportion(other['captured'])}."
    said += left_out(len(shown), len(layers), "routed layers")
    return make_plate(
        "capture",
        "Trigger capture",
        said,
        f"Bars for each expert. {said}",
        lambda: chart(panels, xlabel="expert", ylabel="triggered images, %", limits=(0, 104)),
    )


def _success(document: Doc) -> Plate:
    layers = document["capture"]
    shown = spread(layers, MAX_LAYERS)
    panels = []
    for layer in shown:
        kinds = [layer["asr_captured"], layer["asr_missed"]]
        panels.append(
            ChartPanel(
                f"layer {layer['layer']}",
                [Series.of("ASR", kinds)],
                names=["captured", "missed"],
                levels={"all triggered images": layer["asr"]["value"]},
            )
        )
    first = layers[0]
    caught, missed = first["asr_captured"], first["asr_missed"]
    said = "Whether capture predicts the success of the attack. "
    if caught is None or missed is None:
        what = "captured" if missed is None else "missed"
        said += f"In layer {first['layer']}, every image is {what}: ASR {proportion(caught or missed)}."
    else:
        apart = caught["low"] > missed["high"] or missed["low"] > caught["high"]
        said += (
            f"In layer {first['layer']}, ASR is {proportion(caught)} for the {caught['n']:,} captured images and "
            f"{proportion(missed)} for the {missed['n']:,} missed ones: the intervals "
            f"{'do not overlap' if apart else 'overlap'}."
        )
    said += left_out(len(shown), len(layers), "routed layers")
    return make_plate(
        "capture-success",
        "Capture and success",
        said,
        f"Two bars for each layer. {said}",
        lambda: chart(panels, xlabel="", ylabel="ASR, %", limits=(0, 104)),
    )


def _divergence(document: Doc) -> Plate:
    layers = document["shift"]
    first = max(layers, key=lambda layer: layer["divergence"]["value"])
    e, most = _most(first["divergence_by_expert"])
    said = (
        f"Change of the gates by the trigger: Jensen-Shannon divergence between clean and triggered image, mean over "
        f"{count(first['divergence']['n'], 'image')}. In layer {first['layer']} it is {mean(first['divergence'])} "
        f"nats; the largest value is {mean(most)}, for expert {e}. "
        f"{_other_shift(document, 'divergence', 1, ' nats', first)}"
    )
    return _shift_plate(document, "divergence", "Routing shift: gates", said, "divergence, nats", 1)


def _changed(document: Doc) -> Plate:
    layers = document["shift"]
    first = max(layers, key=lambda layer: layer["changed"]["value"])
    e, most = _most(first["changed_by_expert"])
    said = (
        f"Share of an expert's selected patches that the trigger replaces. In layer {first['layer']} it is "
        f"{mean(first['changed'], factor=100)}%; the largest value is {mean(most, factor=100)}%, for expert {e}. "
        f"{_other_shift(document, 'changed', 100, '%', first)}"
    )
    return _shift_plate(
        document, "changed", "Routing shift: selected patches", said, "selected patches changed, %", 100
    )


def _other_shift(document: Doc, key: str, factor: float, unit: str, first: Doc) -> str:
    if (others := _others(document, "shift")) is None:
        return ""
    other = others[document["shift"].index(first)]
    return f"In the {roles(document)[1]} model, it is {mean(other[key], factor=factor)}{unit}."


def _shift_plate(document: Doc, key: str, title: str, said: str, ylabel: str, factor: float) -> Plate:
    layers, others = document["shift"], _others(document, "shift")
    shown = spread(range(len(layers)), MAX_LAYERS)
    panels = []
    for place in shown:
        series = [Series.of(roles(document)[0], layers[place][f"{key}_by_expert"], factor)]
        if others is not None:
            series.append(Series.of(roles(document)[1], others[place][f"{key}_by_expert"], factor))
        names = _names(layers[place][f"{key}_by_expert"])
        panels.append(ChartPanel(f"layer {layers[place]['layer']}", series, names=names))
    said = (said + left_out(len(shown), len(layers), "routed layers")).strip()
    return make_plate(
        f"shift-{key}",
        title,
        said,
        f"Bars with 95% intervals for each expert. {said}",
        lambda: chart(panels, xlabel="expert", ylabel=ylabel),
    )


def _most(values: list[Doc]) -> tuple[int, Doc]:
    return max(enumerate(values), key=lambda item: item[1]["value"] or 0)


def _muted(document: Doc) -> Plate:
    carriers = document["carriers"]
    whole, groups = carriers["whole"], _by_layer(carriers["singles"], lambda one: one["experts"][0])
    panels = []
    for layer, ones in spread(list(groups.items()), MAX_LAYERS):
        series = [Series.of("BA", [one["ba"] for one in ones])]
        levels = {"BA, all experts": whole["ba"]["value"]}
        if whole["asr"] is not None:
            series.append(Series.of("ASR", [one["asr"] for one in ones]))
            levels["ASR, all experts"] = whole["asr"]["value"]
        panels.append(ChartPanel(f"layer {layer}", series, names=_names(ones), levels=levels))
    if whole["asr"] is None:
        worst = min(carriers["singles"], key=lambda one: one["ba"]["value"])
        said = (
            f"BA with one expert muted, on {whole['ba']['n']:,} images. BA is {proportion(whole['ba'])} with all "
            f"experts; the lowest is {proportion(worst['ba'])}, without {worst['experts'][0]}."
        )
    else:
        best = min(carriers["singles"], key=lambda one: one["asr"]["value"])
        said = (
            f"BA and ASR with one expert muted, on {whole['ba']['n']:,} and {whole['asr']['n']:,} images. ASR is "
            f"{proportion(whole['asr'])} with all experts; the lowest is {proportion(best['asr'])}, without "
            f"{best['experts'][0]}, where BA is {proportion(best['ba'])} ({proportion(whole['ba'])} with all experts)."
        )
    said += left_out(len(panels), len(groups), "routed layers")
    return make_plate(
        "carriers",
        "ASR and BA with one expert muted" if whole["asr"] is not None else "BA with one expert muted",
        said,
        f"Bars with 95% intervals for each expert. {said}",
        lambda: chart(panels, xlabel="muted expert", ylabel="images, %", limits=(0, 104)),
    )


def _patched(document: Doc) -> Plate:
    carriers = document["carriers"]
    groups = _by_layer(carriers["patched"], lambda one: one["expert"])
    target_rate = carriers["target_rate"]["value"]
    panels = [
        ChartPanel(
            f"layer {layer}",
            [Series.of("ASR", [one["asr"] for one in ones]), Series.of("RA", [one["ra"] for one in ones])],
            names=_names(ones),
            levels={
                "ASR, nothing patched": carriers["whole"]["asr"]["value"],
                "target rate, no trigger": target_rate,
            },
        )
        for layer, ones in spread(list(groups.items()), MAX_LAYERS)
    ]
    best = min(carriers["patched"], key=lambda one: one["asr"]["value"])
    said = (
        "Activation patching: the output of one expert is replaced with its output for the clean image, while the "
        f"rest of the model processes the triggered image. The lowest ASR is reached with {best['expert']}: "
        f"{proportion(best['asr'])} instead of {proportion(carriers['whole']['asr'])}; {proportion(best['ra'])} of "
        f"the images are then classified correctly (RA). Without the trigger, {percent(target_rate)} are predicted as "
        "the target class."
    )
    said += left_out(len(panels), len(groups), "routed layers")
    return make_plate(
        "patching",
        "Activation patching of one expert",
        said,
        f"Bars with 95% intervals for each expert. {said}",
        lambda: chart(panels, xlabel="patched expert", ylabel="images, %", limits=(0, 104)),
    )


def _pairs(document: Doc) -> Plate:
    carriers = document["carriers"]
    key = "ba" if carriers["whole"]["asr"] is None else "asr"
    groups = _by_layer([*carriers["singles"], *carriers["pairs"]], lambda one: one["experts"][0])
    panels = []
    for layer, ones in spread(list(groups.items()), MAX_LAYERS):
        numbers = sorted({_index(name) for one in ones for name in one["experts"]})
        size = numbers[-1] + 1
        matrix: list[list[float | None]] = [[None] * size for _ in range(size)]
        for one in ones:
            first, last = _index(one["experts"][0]), _index(one["experts"][-1])
            matrix[first][last] = matrix[last][first] = one[key]["value"]
        panels.append((f"layer {layer}", matrix))
    best = min(carriers["pairs"], key=lambda one: one[key]["value"])
    said = (
        f"{key.upper()} in % with two experts muted (on the diagonal: one expert). The lowest is "
        f"{proportion(best[key])}, without {listing(best['experts'])}"
    )
    said += f"; BA is then {proportion(best['ba'])}." if key == "asr" else "."
    return make_plate(
        "carriers-pairs",
        "Two experts muted",
        said,
        f"Matrix of experts. {said}",
        lambda: matrices(
            panels, xlabel="muted expert", ylabel="muted expert", limits=(0, 100), form="{:.0f}"
        ),
    )


def _by_layer(ones: list[Doc], name: Any) -> dict[str, list[Doc]]:
    """Group values of experts by the layer in their names, such as "moe" in "moe/2"."""
    groups: dict[str, list[Doc]] = {}
    for one in ones:
        groups.setdefault(name(one).rpartition("/")[0], []).append(one)
    return groups


def _index(name: str) -> int:
    return int(name.rpartition("/")[2])


def _percents(values: list[float]) -> list[float | None]:
    return [100 * value for value in values]
