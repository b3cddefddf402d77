"""Figures of training: loss and accuracy, and the routing of the probe images after every epoch."""

from __future__ import annotations

from collections.abc import Iterator

from backdoorbench_moe.analysis.document import decode_picture
from backdoorbench_moe.analysis.figures.charts import ChartPanel, Series, chart
from backdoorbench_moe.analysis.figures.mosaic import MosaicRow, draw_mosaic, mark_selected
from backdoorbench_moe.analysis.figures.plate import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_MAP_LAYERS,
    Doc,
    Plate,
    left_out,
    make_plate,
    spread,
)
from backdoorbench_moe.analysis.figures.words import inputs, listing, number, percent
from backdoorbench_moe.wording.counting import count


def draw_training(document: Doc) -> Iterator[Plate]:
    """Draw the loss and training accuracy of every epoch and, if there was a probe, the routing of its images."""
    facts, probe = document["run"], document["probe"]
    if history := facts["record"]["history"]:
        yield _history(
            history,
            inputs(document),
            ", including poisoned ones," if (facts["record"]["poison"] or {}).get("n") else "",
        )
    if probe is not None:
        yield _settling(probe)
        if probe["fooled"] is not None:
            yield _emergence(probe)
        yield _maps(probe, "clean")
        if probe["triggered"] is not None:
            yield _maps(probe, "triggered")


def _history(history: list[Doc], kind: str, poisoned: str) -> Plate:
    epochs = [row["epoch"] for row in history]
    panels = [
        ChartPanel("loss", [Series("run", [row["loss"] for row in history], style="line")], x=epochs),
        ChartPanel(
            "training accuracy, %",
            [Series("run", [row["train_accuracy"] for row in history], style="line")],
            x=epochs,
        ),
    ]
    first, last = history[0], history[-1]
    loss, accuracy = (
        [format(row[key], form) for row in (first, last)]
        for key, form in (("loss", ".3f"), ("train_accuracy", ".1f"))
    )
    said = f"{count(len(history), 'epoch')}: loss {' to '.join(loss)}, accuracy on the training {kind}{poisoned} "
    said += f"{' to '.join(accuracy)}%."
    return make_plate(
        "history",
        "Training",
        said,
        f"Two lines over the epochs. {said}",
        lambda: chart(panels, xlabel="epoch", ylabel="", share_y=False, limits=(None, None), height=1.4),
    )


def _maps(probe: Doc, kind: str) -> Plate:
    """Draw the patches of the first probe image that each expert takes, epoch by epoch.

    Source: the layout is that of Figure 6 of BadPatches.
    """
    image = decode_picture(probe[kind][0])
    key = "maps" if kind == "clean" else "maps_triggered"
    layers = spread(probe["layers"], MAX_MAP_LAYERS)
    most = max(len(layer["maps"][0]) for layer in probe["layers"])
    experts = min(MAX_EXPERTS, most)
    rows = []
    for layer in layers:
        if len(probe["layers"]) > 1:
            rows.append(MosaicRow(f"layer {layer['layer']}"))
        for e in range(min(experts, len(layer["maps"][0]))):
            rows.append(MosaicRow(f"expert {e}", [mark_selected(image, moment[e]) for moment in layer[key]]))
    columns = [f"epoch {epoch}" if place == 0 else str(epoch) for place, epoch in enumerate(probe["shown"])]
    settled = layers[-1]["settled" if kind == "clean" else "settled_triggered"]
    halfway = probe["epochs"][len(settled) // 2]
    said = (
        f"Patches that each expert takes of the {kind} test image {probe['indices'][0]} ({probe['labels'][0]}), before "
        f"training (epoch 0) and after epoch {listing([str(epoch) for epoch in probe['shown'][1:]])}. Over all "
        f"{count(len(probe['indices']), 'probe image')}, the overlap (Jaccard) of the patches after epoch {halfway} "
        f"and after the last epoch is {listing([number(value, '{:.2f}') for value in settled[halfway]])} for the "
        f"experts of layer {layers[-1]['layer']}."
    )
    said += left_out(len(layers), len(probe["layers"]), "routed layers")
    said += left_out(experts, most, "experts")
    return make_plate(
        f"probe-{kind}",
        f"Over training: a {kind} image",
        said,
        f"The image with the patches that each expert takes, a column for each epoch. {said}",
        lambda: draw_mosaic(columns, rows),
    )


def _settling(probe: Doc) -> Plate:
    layers = spread(probe["layers"], MAX_LAYERS)
    panels = [
        ChartPanel(
            f"layer {layer['layer']}",
            [
                Series(f"expert {e}", [row[e] for row in layer["settled"]], style="line")
                for e in range(min(MAX_EXPERTS, len(layer["settled"][0])))
            ],
            x=probe["epochs"],
        )
        for layer in layers
    ]
    means = [sum(row) / len(row) for row in probe["layers"][0]["settled"]]
    said = (
        f"Overlap (Jaccard) of the patches that each expert takes and those that it takes after the last epoch, mean "
        f"over {count(len(probe['indices']), 'clean probe image')}. In layer {layers[0]['layer']}, the mean over the "
        f"experts is {means[0]:.2f} before training, {means[1]:.2f} after the first epoch and {means[-2]:.2f} before "
        "the last epoch."
    )
    said += left_out(len(layers), len(probe["layers"]), "routed layers")
    most = max(len(layer["settled"][0]) for layer in probe["layers"])
    said += left_out(min(MAX_EXPERTS, most), most, "experts")
    return make_plate(
        "probe-settling",
        "Convergence of the routing",
        said,
        f"A line for each expert over the epochs. {said}",
        lambda: chart(panels, xlabel="epoch", ylabel="Jaccard with last epoch", limits=(0, 1.04)),
    )


def _emergence(probe: Doc) -> Plate:
    layers = spread(probe["layers"], MAX_LAYERS)
    panels = [
        ChartPanel(
            f"layer {layer['layer']}",
            [
                Series("target class, with trigger", _percents(probe["fooled"]), style="line"),
                Series("trigger captured", _percents(layer["captured"]), style="line"),
                Series("selected patches changed", _percents(layer["changed"]), style="line"),
                Series("clean accuracy", _percents(probe["right"]), style="line"),
            ],
            x=probe["epochs"],
        )
        for layer in layers
    ]
    first = layers[0]
    ends = [
        f"{name} {percent(100 * values[0])} before training, {percent(100 * values[-1])} at the end"
        for name, values in (
            ("predicted as the target class", probe["fooled"]),
            ("trigger captured", first["captured"]),
            ("selected patches changed by the trigger", first["changed"]),
        )
    ]
    said = (
        f"Effect of the trigger on {count(len(probe['indices']), 'probe image')} (layer {first['layer']}): "
        f"{'; '.join(ends)}."
    )
    said += left_out(len(layers), len(probe["layers"]), "routed layers")
    return make_plate(
        "probe-backdoor",
        "Effect of the trigger over training",
        said,
        f"Lines over the epochs. {said}",
        lambda: chart(panels, xlabel="epoch", ylabel="probe images, %", limits=(0, 104)),
    )


def _percents(values: list[float]) -> list[float | None]:
    return [100 * value for value in values]
