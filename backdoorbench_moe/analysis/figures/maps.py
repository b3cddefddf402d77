"""Patch maps of example images: the patches that each expert takes, in one or two models.

Source: the layout is that of Figures 4, 5, 6 and 8 of BadPatches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from backdoorbench_moe.analysis.document import decode_picture
from backdoorbench_moe.analysis.figures.mosaic import MosaicRow, draw_mosaic, image_cell, mark_selected
from backdoorbench_moe.analysis.figures.plate import (
    MAX_EXPERTS,
    MAX_MAP_LAYERS,
    Doc,
    Plate,
    left_out,
    make_plate,
    spread,
)
from backdoorbench_moe.analysis.figures.words import roles, short
from backdoorbench_moe.wording.counting import capital, count


def draw_maps(document: Doc) -> Iterator[Plate]:
    """Draw one figure for each example: the clean and the triggered image in each model."""
    if document["examples"] is None:
        return
    for place in range(len(document["examples"]["indices"])):
        yield _map(document, place)


def _map(document: Doc, place: int) -> Plate:
    examples = document["examples"]
    models = examples["models"]
    layers = models[0]["clean"]["layers"]
    chosen = spread(range(len(layers)), MAX_MAP_LAYERS)
    most = max((len(layer["selected"][place]) for layer in layers), default=0)
    experts = min(MAX_EXPERTS, most)
    name = capital(examples["names"][place])
    every: list[int | None] = [*chosen] or [None]
    rows = [row for layer in every for row in _layer_rows(document, place, layer, experts)]
    columns = ["image", *(f"expert {e}" for e in range(experts))]
    said = _said(document, place)
    sentence = said
    if layers:
        sentence += " The patches that an expert takes are framed; the others are grey."
        sentence += left_out(len(chosen), len(layers), "routed layers")
        sentence += left_out(experts, most, "experts")
    alt = f"{name}{' with the patches that each expert takes' if layers else ''}. {said}"
    return make_plate(f"image-{place + 1}", name, sentence, alt, lambda: draw_mosaic(columns, rows))


def _layer_rows(document: Doc, place: int, layer: int | None, experts: int) -> Iterator[MosaicRow]:
    examples = document["examples"]
    models = examples["models"]
    if layer is not None and len(models[0]["clean"]["layers"]) > 1:
        yield MosaicRow(f"layer {models[0]['clean']['layers'][layer]['layer']}")
    for model, role in zip(models, roles(document), strict=True):
        for kind in ("clean", "triggered"):
            if (view := model[kind]) is None:
                continue
            image = decode_picture(examples[kind][place])
            label = f"{role} model,\n{kind} image:\n{short(view['predicted'][place], 18)}"
            if layer is None:
                yield MosaicRow(label, [image_cell(image, (1, 1))])
                continue
            selected = view["layers"][layer]["selected"][place]
            rows, columns = len(selected[0]), len(selected[0][0])
            cells = [mark_selected(image, chosen) for chosen in selected[:experts]]
            yield MosaicRow(label, [image_cell(image, (rows, columns)), *cells])


def _said(document: Doc, place: int) -> str:
    """State the predictions of each model, and how many selections of its experts the trigger changes."""
    examples = document["examples"]
    label = examples["labels"][place]
    parts = []
    for model, role in zip(examples["models"], roles(document), strict=True):
        text = f"the {role} model predicts {model['clean']['predicted'][place]}"
        if model["triggered"] is not None:
            text += f", and with the trigger {model['triggered']['predicted'][place]}"
            if changed := _changed(model, place):
                text += f" ({changed})"
        parts.append(text)
    is_a = "An image from a file, of unknown class: " if label is None else f"A test image of class {label}: "
    return capital(f"{is_a}{'; '.join(parts)}.")


def _changed(model: Doc, place: int) -> str:
    """State how many selections of the experts the trigger changes; "" for a dense model."""
    layers = [*zip(model["clean"]["layers"], model["triggered"]["layers"], strict=True)]
    if not layers:
        return ""
    total = sum(
        int((np.asarray(before["selected"][place]) != np.asarray(after["selected"][place])).sum())
        for before, after in layers
    )
    where = f" in {len(layers)} layers" if len(layers) > 1 else ""
    return f"the trigger changes {count(total, 'selection')} of the experts{where}"
