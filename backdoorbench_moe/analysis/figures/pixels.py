"""Figures of the relation between pixel values and routing (the question of Figure 7 of BadPatches)."""

from __future__ import annotations

from collections.abc import Iterator

from backdoorbench_moe.analysis.figures.charts import ChartPanel, Series, chart, matrices
from backdoorbench_moe.analysis.figures.plate import (
    MAX_CLASSES,
    MAX_EXPERTS,
    MAX_MAP_LAYERS,
    Doc,
    Plate,
    left_out,
    make_plate,
    spread,
)
from backdoorbench_moe.analysis.figures.words import mean, percent, short

PAPERS_DATA, PAPERS_MODEL = ("cifar10", "gtsrb"), "pmoe"
# Upper limits of a rank-biserial correlation by strength: Cohen's conventions for r.
STRENGTHS = ((0.1, "negligible"), (0.3, "small"), (0.5, "medium"))


def draw_pixels(document: Doc) -> Iterator[Plate]:
    """Draw the distributions of patch sums, and the effects by class."""
    if document["pixels"] is None:
        return
    yield _distributions(document)
    if any(one for layer in document["pixels"] for row in layer["by_class"] for one in row):
        yield _by_class(document)


def strength(effect: float) -> str:
    """Name the strength of a rank-biserial correlation."""
    return next((word for limit, word in STRENGTHS if abs(effect) < limit), "large")


def strongest(document: Doc) -> tuple[str, int, Doc] | None:
    """Return the layer, the expert and the difference with the largest effect; None if nothing can be compared."""
    found = [
        (layer["layer"], e, one)
        for layer in document["pixels"]
        for e, one in enumerate(layer["overall"])
        if one is not None
    ]
    return max(found, key=lambda item: abs(item[2]["rank_biserial"]), default=None)


def verdict(document: Doc) -> str:
    """State how strongly pixel values and routing are related and, for the paper's data and model, if the paper agrees.

    No p-value is stated, since the patches of an image are not independent.
    """
    if (found := strongest(document)) is None:
        return "Every expert takes all patches or none, so nothing can be compared."
    layer, e, one = found
    word = strength(one["rank_biserial"])
    if not one["rank_biserial"]:
        text = "No expert takes brighter or darker patches than the others: the AUC is 0.5."
        return text + _compare_with_paper(document["run"], word)
    darker = "brighter" if one["auc"] > 0.5 else "darker"
    index = next(number for number, item in enumerate(document["pixels"]) if item["layer"] == layer)
    image = document["pixels"][index]["by_image"][e]
    said = (
        f"The relation between pixel values and routing is strongest for expert {e} of {layer}, which takes {darker} "
        f"patches: AUC {one['auc']:.3f} (rank-biserial correlation {one['rank_biserial']:+.2f}, {word}; mean "
        f"difference of the patch sums within an image {mean(image)}, where the largest possible sum is "
        f"{_most(document, index):g})."
    )
    return said + _compare_with_paper(document["run"], word)


def _compare_with_paper(run: Doc, word: str) -> str:
    """Return a sentence on the paper's claim; "" for data or a model that the paper does not use."""
    if run["data"] not in PAPERS_DATA or run["model"] != PAPERS_MODEL:
        return ""
    agrees = "agrees with" if word in ("negligible", "small") else "does not agree with"
    return f" This {agrees} BadPatches, which reports no strong relation for this data set."


def _most(document: Doc, index: int) -> float:
    """Return the largest possible patch sum."""
    return float(document["pixels"][index]["edges"][-1])


def _distributions(document: Doc) -> Plate:
    layers = document["pixels"]
    shown = spread(layers, MAX_MAP_LAYERS)
    most = max(len(layer["overall"]) for layer in layers)
    experts = min(MAX_EXPERTS, most)
    panels = []
    for layer in shown:
        for e, one in enumerate(layer["overall"][:experts]):
            title = f"expert {e}" if len(layers) == 1 else f"{layer['layer']}/{e}"
            title += "" if one is None else f": {'AUC ' if len(layers) == 1 else ''}{one['auc']:.2f}"
            series = [
                Series(name, _shares(layer[key][e]), style="steps")
                for name, key in (("taken", "taken"), ("not taken", "not_taken"))
            ]
            panels.append(ChartPanel(title, series, x=layer["edges"]))
    said = "Brightness of the patches that each expert takes and of the others, with the AUC as title (0.5: equal). "
    said += verdict(document)
    said += left_out(len(shown), len(layers), "routed layers")
    said += left_out(experts, most, "experts")
    return make_plate(
        "pixels",
        "Pixel values and routing",
        said,
        f"Two distributions of patch sums for each expert. {said}",
        lambda: chart(panels, xlabel="patch sum, dark to bright", ylabel="share of patches, %", height=1.15),
    )


def _shares(counts: list[int]) -> list[float | None]:
    total = sum(counts)
    return [100 * value / total if total else None for value in counts]


def _by_class(document: Doc) -> Plate:
    layers, classes = document["pixels"], document["classes"]
    shown = spread(layers, MAX_MAP_LAYERS)
    cells = [
        (one["auc"], classes[c], e, layer["layer"])
        for layer in layers
        for c, row in enumerate(layer["by_class"])
        for e, one in enumerate(row)
        if one is not None
    ]
    low, high = min(cells, key=lambda item: item[0]), max(cells, key=lambda item: item[0])
    strong = sum(abs(2 * auc - 1) >= STRENGTHS[1][0] for auc, *_ in cells)
    said = (
        f"AUC by class (0.5: equal; above 0.5: the expert takes brighter patches), from {low[0]:.2f} ({low[1]}, "
        f"expert {low[2]} of {low[3]}) to {high[0]:.2f} ({high[1]}, expert {high[2]} of {high[3]}); "
        f"{percent(100 * strong / len(cells), 0)} of the values are medium or large effects."
    )
    said += left_out(len(shown), len(layers), "routed layers")
    panels = [
        (
            f"layer {layer['layer']}",
            [[None if one is None else one["auc"] for one in row] for row in layer["by_class"]],
        )
        for layer in shown
    ]
    names = [short(name) for name in classes]
    return make_plate(
        "pixels-by-class",
        "Pixel values and routing, by class",
        said,
        f"Matrix of classes and experts. {said}",
        lambda: matrices(
            panels,
            xlabel="expert",
            ylabel="class",
            limits=(0, 1),
            rows=names if len(classes) <= MAX_CLASSES else None,
        ),
    )
