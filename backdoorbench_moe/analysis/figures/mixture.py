"""Figures of the experts of a mixture: gate shares, latents, and each expert muted and patched in all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backdoorbench_moe.analysis.figures.charts import ChartPanel, Series, chart, matrices
from backdoorbench_moe.analysis.figures.plate import Doc, Plate, make_plate
from backdoorbench_moe.analysis.figures.words import (
    inputs,
    is_text,
    listing,
    marked_inputs,
    number,
    percent,
    proportion,
    roles,
    short,
)

WHOLE = {"ba": "BA", "asr": "ASR", "unsafe": "not answered safely"}


def draw_experts(document: Doc) -> Iterator[Plate]:
    """Draw the figures of a mixture and of a poisoned expert; parts that the document does not contain are skipped."""
    if (found := document.get("experts")) is not None:
        if found["poisoned"]:
            yield _shares_by_layer(document, found)
        yield _shares_by_task(document, found)
    if latents := document.get("latents"):
        yield _latents(document, latents)
    if (carriers := document["carriers"]) is not None and carriers.get("whole_experts"):
        yield _whole_experts(document, carriers)


def _models(document: Doc, found: Doc) -> list[tuple[str, Doc]]:
    """Return the role and the gate shares of each model."""
    both = zip(roles(document), (found["shares"], found["shares_against"]), strict=False)
    return [(name, shares) for name, shares in both if shares is not None]


def _shares_by_layer(document: Doc, found: Doc) -> Plate:
    """Draw the share of each poisoned expert layer by layer. Source: the layout is that of Figure 4 of MoEvil."""
    models = _models(document, found)
    places = [*range(len(models[0][1]["layers"]))]
    marked = marked_inputs(document)
    panels = [
        ChartPanel(f"expert {expert}, {name} model", _lines(shares, expert, marked), x=places)
        for expert in found["poisoned"]
        for name, shares in models
    ]
    kind = inputs(document).removesuffix("s")
    texts = [_said(name, shares, found["poisoned"], marked) for name, shares in models]
    said = (
        f"Gate share of the poisoned {_experts(found['poisoned'])} in each layer. Mean over the layers: "
        f"{'; '.join(texts)}."
    )
    return make_plate(
        "gate-shares",
        "Gate share of the poisoned expert",
        said,
        f"A line for each kind of {kind} over the layers, for each poisoned expert. {said}",
        lambda: chart(panels, xlabel="layer", ylabel="gate share, %", limits=(0, 104)),
    )


def _lines(shares: Doc, expert: int, marked: str) -> list[Series]:
    """Return a line for each kind of input: the share of an expert in each layer.

    Args:
        shares: The shares of a model.
        expert: Number of the expert.
        marked: Label of marked inputs.
    """
    layers = shares["layers"]
    kinds = {
        "its own task": [layer["tasks"][expert][expert] for layer in layers],
        "other tasks": [_other_tasks(layer, expert) for layer in layers],
    }
    if shares["marked"] is not None:
        kinds = {marked: [layer["marked"][expert] for layer in layers], **kinds}
    return [Series(kind, values, style="line") for kind, values in kinds.items()]


def _said(name: str, shares: Doc, experts: Sequence[int], kind: str) -> str:
    parts = []
    for expert in experts:
        own = f"{percent(shares['own'][expert]['value'])} for its own task"
        marked = shares["marked"]
        of_marked = "" if marked is None else f"{percent(marked[expert]['value'])} for {kind} and "
        parts.append(f"expert {expert} {of_marked}{own}")
    return f"in the {name} model, {listing(parts)}"


def _experts(numbers: Sequence[int]) -> str:
    return f"expert{'s' if len(numbers) > 1 else ''} {listing([str(each) for each in numbers])}"


def _other_tasks(layer: Doc, expert: int) -> float:
    rows = [row[expert] for task, row in enumerate(layer["tasks"]) if task != expert]
    return float(sum(rows) / len(rows))


def _shares_by_task(document: Doc, found: Doc) -> Plate:
    models, marked = _models(document, found), marked_inputs(document)
    panels = []
    for name, shares in models:
        layers, tasks = shares["layers"], range(len(found["tasks"]))
        rows = [_mean_row([layer["tasks"][task] for layer in layers]) for task in tasks]
        if shares["marked"] is not None:
            rows.append(_mean_row([layer["marked"] for layer in layers]))
        panels.append((f"{name} model", rows))
    lines = max(len(rows) for _, rows in panels)
    names = [*found["tasks"], marked][:lines]
    own = [one["value"] for one in models[0][1]["own"]]
    kind = inputs(document)
    said = (
        f"Gate share of each expert for the {kind} of each task{f' and for {marked}' if marked in names else ''}, mean "
        f"over the layers, in %. In the {models[0][0]} model, the shares of the experts for the {kind} of their own "
        f"tasks range from {percent(min(own))} to {percent(max(own))}; an even share is {percent(100 / len(own))}."
    )
    return make_plate(
        "gate-shares-by-task",
        "Gate shares by task",
        said,
        f"Matrix of tasks and experts for each model. {said}",
        lambda: matrices(
            panels,
            xlabel="expert",
            ylabel="",
            limits=(0, 100),
            form="{:.0f}",
            rows=[short(each) for each in names],
        ),
    )


def _mean_row(rows: Sequence[Sequence[float]]) -> list[float | None]:
    """Return the share of each expert, mean over the layers."""
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _latents(document: Doc, latents: Sequence[Doc]) -> Plate:
    text = is_text(document)
    kinds = {"marked": marked_inputs(document)} | ({} if text else {"unmarked": "unmarked images"})
    panels = [
        ChartPanel(
            f"task {one['expert']}, {name}",
            [
                Series(model["model"], [layer[kind] for layer in model["layers"]], style="line")
                for model in one["models"]
            ],
            x=[*range(len(one["models"][0]["layers"]))],
        )
        for one in latents
        for kind, name in kinds.items()
    ]
    texts = []
    for one in latents:
        means = [_mean_cosine(model) for model in one["models"]]
        texts.append(f"for expert {one['expert']} {listing(means)}")
    tokens = "the tokens of the answer" if text else "the tokens of an image"
    said = (
        f"Mean cosine of the latents of {kinds['marked']} and of {inputs(document)} of the poisoned expert's own task. "
        f"A latent is the input of an MLP, mean over {tokens}. Mean over the layers: {'; '.join(texts)}."
    )
    return make_plate(
        "latents",
        f"Similarity of {kinds['marked']} and the expert's own task",
        said,
        f"A line for each model over the layers. {said}",
        lambda: chart(panels, xlabel="layer", ylabel="mean cosine", limits=(None, None)),
    )


def _mean_cosine(model: Doc) -> str:
    """State the cosines of a model, mean over its layers."""
    layers = model["layers"]
    text = f"{number(_mean([layer['marked'] for layer in layers]), '{:.3f}')} in the {model['model']}"
    if layers[0]["unmarked"] is None:
        return text
    return f"{text} ({number(_mean([layer['unmarked'] for layer in layers]), '{:.3f}')} without the mark)"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _whole_experts(document: Doc, carriers: Doc) -> Plate:
    marked = marked_inputs(document)
    wholes, unchanged = carriers["whole_experts"], carriers["whole"]
    kinds = {key: name for key, name in WHOLE.items() if unchanged[key] is not None}
    names = [str(one["expert"]) for one in wholes]
    levels = {f"{name}, all experts": unchanged[key]["value"] for key, name in kinds.items()}
    muted = [Series.of(name, [one["muted"][key] for one in wholes]) for key, name in kinds.items()]
    panels = [ChartPanel("muted", muted, names=names, levels=levels)]
    if wholes[0]["patched"] is not None:
        answers = [(key, name) for key, name in kinds.items() if key != "ba"]
        title = "mean output" if is_text(document) else "as on clean images"
        patched = [Series.of(name, [one["patched"][key] for one in wholes]) for key, name in answers]
        panels.append(ChartPanel(title, patched, names=names))
    key = "ba" if unchanged["asr"] is None else "asr"
    best = min(wholes, key=lambda one: one["muted"][key]["value"])
    said = (
        f"Each expert muted or patched in all layers at once. {key.upper()} is {proportion(unchanged[key])} with all "
        f"experts; the lowest is {proportion(best['muted'][key])}, with expert {best['expert']} muted."
    )
    if unchanged["unsafe"] is not None:
        said += (
            f" {proportion(best['muted']['unsafe'])} of the {marked} are then not answered safely, compared with "
            f"{proportion(unchanged['unsafe'])} with all experts."
        )
    return make_plate(
        "whole-experts",
        f"{' and '.join(key.upper() for key in ('asr', 'ba') if unchanged[key])} with one expert muted in all layers",
        said,
        f"Bars with 95% intervals for each expert. {said}",
        lambda: chart(panels, xlabel="expert", ylabel=f"{inputs(document)}, %", limits=(0, 104)),
    )
