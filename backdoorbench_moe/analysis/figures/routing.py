"""Figures of the routing of clean images: heat maps by expert and class, load, overlap, comparison of models."""

from __future__ import annotations

from collections.abc import Iterator

from backdoorbench_moe.analysis.figures.charts import ChartPanel, Series, chart, matrices
from backdoorbench_moe.analysis.figures.mosaic import MosaicRow, Picture, draw_mosaic, heat_map
from backdoorbench_moe.analysis.figures.plate import (
    MAX_CLASSES,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_MAP_LAYERS,
    Doc,
    Plate,
    left_out,
    make_plate,
    spread,
)
from backdoorbench_moe.analysis.figures.words import listing, mean, number, percent, roles, short

# A coefficient of variation below this is rounding error.
SAME = 1e-6


def draw_routing(document: Doc) -> Iterator[Plate]:
    """Draw all figures of the routing of clean images."""
    layers = document["routing"]
    if layers is None:
        return
    yield _frequency(document)
    yield _by_class(document)
    if _load_differs(layers):
        yield _class_load(document)
    yield _load(document)
    if any(len(layer["load"]) > 1 for layer in layers):
        yield _overlap(document)
    if document["comparison"] is not None:
        yield _comparison(document)


def _frequency(document: Doc) -> Plate:
    """Draw how often each expert takes each patch, in each model."""
    views = [document["routing"]]
    if document["findings_against"] is not None and document["findings_against"]["routing"] is not None:
        views.append(document["findings_against"]["routing"])
    shown = spread(range(len(views[0])), MAX_LAYERS)
    most_experts = max(len(layer["load"]) for layer in views[0])
    experts = min(MAX_EXPERTS, most_experts)
    names = roles(document)
    rows = []
    for number_ in shown:
        for view, role in zip(views, names, strict=False):
            layer = view[number_]
            label = role if len(views[0]) == 1 else f"{role}\n{short(layer['layer'])}"
            cells = _heat_maps(layer["frequency"], layer["grid"], experts)
            nobody = heat_map(layer["untaken_frequency"], tuple(layer["grid"]), 1)
            rows.append(MosaicRow(label, [*cells, nobody]))
    columns = [*(f"expert {e}" for e in range(experts)), "no expert"]
    first = views[0][0]
    e, p, most = max(
        ((e, p, value) for e, row in enumerate(first["frequency"]) for p, value in enumerate(row)),
        key=lambda item: item[2],
    )
    row, column = divmod(p, first["grid"][1])
    said = (
        f"Share of clean test images in which each expert takes each patch. In layer {first['layer']}, the largest is "
        f"{percent(100 * most)} (expert {e}, row {row + 1}, column {column + 1}); "
        f"{percent(100 * first['takers'][0])} of all patches are routed to no expert."
    )
    said += left_out(len(shown), len(views[0]), "routed layers")
    said += left_out(experts, most_experts, "experts")
    return make_plate(
        "routing",
        "Routing by patch position",
        said,
        f"Heat maps of {first['grid'][0]} by {first['grid'][1]} patches, one for each expert. {said}",
        lambda: draw_mosaic(columns, rows, scale=(1, "share of images")),
    )


def _heat_maps(frequency: list[list[float | None]], grid: list[int], experts: int) -> list[Picture | None]:
    """Draw the first experts of a layer; None for each expert that the layer does not have."""
    cells: list[Picture | None] = [heat_map(row, (grid[0], grid[1]), 1) for row in frequency[:experts]]
    return cells + [None] * (experts - len(cells))


def _by_class(document: Doc) -> Plate:
    """Draw heat maps of the classes whose routing differs most from that of all images."""
    layers, classes = document["routing"], document["classes"]
    shown = spread(range(len(layers)), MAX_MAP_LAYERS)
    most_experts = max(len(layer["load"]) for layer in layers)
    experts = min(MAX_EXPERTS, most_experts)
    distance = {c: d for c in range(len(classes)) if (d := _distance(layers, c)) is not None}
    ranked = sorted(distance, key=lambda c: (-distance[c], c))
    kept = sorted(ranked[:MAX_CLASSES])
    rows = []
    for number_ in shown:
        layer = layers[number_]
        if len(layers) > 1:
            rows.append(MosaicRow(f"layer {layer['layer']}"))
        for c in kept:
            cells = _heat_maps(layer["by_class"][c], layer["grid"], experts)
            rows.append(MosaicRow(short(classes[c]), cells))
    far, near = ranked[0], ranked[-1]
    said = (
        f"Share of the images of each class in which each expert takes each patch. Class {classes[far]} differs most "
        f"from all images (mean absolute difference {100 * distance[far]:.1f} percentage points), class "
        f"{classes[near]} least ({100 * distance[near]:.1f})."
    )
    said += left_out(len(kept), len(distance), "classes, those that differ most")
    said += left_out(len(shown), len(layers), "routed layers")
    said += left_out(experts, most_experts, "experts")
    columns = [f"expert {e}" for e in range(experts)]
    return make_plate(
        "routing-by-class",
        "Routing by patch position and class",
        said,
        f"Heat maps of patches, a row for each class, a column for each expert. {said}",
        lambda: draw_mosaic(columns, rows, scale=(1, "share of images of the class")),
    )


def _distance(layers: list[Doc], c: int) -> float | None:
    """Return the mean absolute difference of the frequencies of a class and of all images; None without images."""
    gaps = [
        abs(value - overall)
        for layer in layers
        for row, whole in zip(layer["by_class"][c], layer["frequency"], strict=True)
        for value, overall in zip(row, whole, strict=True)
        if value is not None
    ]
    return sum(gaps) / len(gaps) if gaps else None


def _class_loads(layer: Doc) -> list[list[float | None]]:
    """Return the mean number of patches of an image that each expert takes, by class: (classes, E)."""
    return [[None if None in row else sum(row) for row in of_class] for of_class in layer["by_class"]]


def _load_differs(layers: list[Doc]) -> bool:
    """Return whether the load of any expert depends on the class. In expert choice, it is always K patches."""
    return any(
        value is not None and abs(value - whole) > 1e-3 * max(1.0, whole)
        for layer in layers
        for row in _class_loads(layer)
        for value, whole in zip(row, layer["load"], strict=True)
    )


def _class_load(document: Doc) -> Plate:
    layers, classes = document["routing"], document["classes"]
    loads = [(layer["layer"], _class_loads(layer)) for layer in layers]
    cells = [
        (value, classes[c], e, name)
        for name, rows in loads
        for c, row in enumerate(rows)
        for e, value in enumerate(row)
        if value is not None
    ]
    panels = spread(loads, MAX_LAYERS)
    most, least = max(cells, key=lambda one: one[0]), min(cells, key=lambda one: one[0])
    said = (
        f"Mean number of patches of an image that each expert takes, by class: from {least[0]:.1f} ({least[1]}, "
        f"expert {least[2]} of {least[3]}) to {most[0]:.1f} ({most[1]}, expert {most[2]} of {most[3]})."
    )
    said += left_out(len(panels), len(layers), "routed layers")
    names = [short(name) for name in classes] if len(classes) <= MAX_CLASSES else None
    return make_plate(
        "load-by-class",
        "Load by class",
        said,
        f"Matrix of classes and experts for each layer. {said}",
        lambda: matrices(panels, xlabel="expert", ylabel="class", form="{:.0f}", rows=names),
    )


def _load(document: Doc) -> Plate:
    layers = document["routing"]
    shown = spread(layers, MAX_LAYERS)
    panels = [
        ChartPanel(
            f"layer {layer['layer']}",
            [
                Series("selected patches", [100 * v if v is not None else None for v in layer["load_share"]]),
                Series("gate mass", [100 * v if v is not None else None for v in layer["mass_share"]]),
            ],
            names=[str(e) for e in range(len(layer["load"]))],
            levels={"even": 100 / len(layer["load"])},
        )
        for layer in shown
    ]
    worst = max(layers, key=lambda layer: layer["load_cv"] or 0)
    said = (
        f"Share of each expert in the selected patches and in their gate mass. The coefficient of variation over the "
        f"experts is {percent(100 * _rounded(worst['load_cv']))} for the patches and "
        f"{percent(100 * _rounded(worst['mass_cv']))} for the gate mass"
        f"{' (layer ' + worst['layer'] + ', the most uneven one)' if len(layers) > 1 else ''}; the normalized entropy "
        f"of the gates is {mean(worst['entropy'])}, and {mean(worst['untaken'])} of the "
        f"{len(worst['untaken_frequency'])} patches of an image are routed to no expert."
    )
    said += left_out(len(shown), len(layers), "routed layers")
    return make_plate(
        "load",
        "Load and balance",
        said,
        f"Bars for each expert. {said}",
        lambda: chart(panels, xlabel="expert", ylabel="share, %"),
    )


def _rounded(value: float | None) -> float:
    """Round a coefficient of variation that is only rounding error to 0; None as well."""
    return 0.0 if value is None or value < SAME else value


def _overlap(document: Doc) -> Plate:
    layers = document["routing"]
    shown = spread(layers, MAX_LAYERS)
    pairs = [
        (layer["overlap"][e][f], e, f, layer["layer"])
        for layer in layers
        for e in range(len(layer["load"]))
        for f in range(e)
    ]
    most, least = max(pairs), min(pairs)
    said = (
        f"Overlap of the patches of two experts (mean Jaccard index; 1: the same patches): from {least[0]:.2f} "
        f"(experts {least[2]} and {least[1]} of {least[3]}) to {most[0]:.2f} (experts {most[2]} and {most[1]} of "
        f"{most[3]})."
    )
    said += left_out(len(shown), len(layers), "routed layers")
    panels = [(f"layer {layer['layer']}", layer["overlap"]) for layer in shown]
    return make_plate(
        "overlap",
        "Overlap of the experts",
        said,
        f"Matrix of experts. {said}",
        lambda: matrices(panels, xlabel="expert", ylabel="expert", limits=(0, 1)),
    )


def _comparison(document: Doc) -> Plate:
    layers, other = document["comparison"]["clean"], roles(document)[1]
    shown = spread(layers, MAX_LAYERS)
    first = layers[0]
    same = [number(one["value"], "{:.2f}") for one in first["same"]]
    best = [max(range(len(row)), key=lambda f: row[f] or 0) for row in first["across"]]
    said = (
        f"Overlap (Jaccard) of the patches of each expert and of every expert of the {other} model "
        f"({document['against']['name']}), on clean images. In layer {first['layer']}, the overlap with the expert of "
        f"the same number is {listing(same)}; the experts most similar to experts 0 to {len(best) - 1} are "
        f"{listing([str(f) for f in best])}. If the models were trained separately, experts of the same number are "
        "unrelated."
    )
    said += left_out(len(shown), len(layers), "routed layers")
    panels = [(f"layer {layer['layer']}", layer["across"]) for layer in shown]
    return make_plate(
        "comparison",
        "Overlap with the experts of the other model",
        said,
        f"Matrix of the experts of both models. {said}",
        lambda: matrices(panels, xlabel=f"expert of the {other} model", ylabel="expert", limits=(0, 1)),
    )
