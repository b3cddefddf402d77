"""Tables and summary of a report, built from the JSON document of an analysis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backdoorbench_moe.analysis.figures.pixels import verdict
from backdoorbench_moe.analysis.figures.plate import Doc
from backdoorbench_moe.analysis.figures.words import (
    NONE,
    is_text,
    listing,
    marked_inputs,
    mean,
    number,
    percent,
    proportion,
    role,
    roles,
)
from backdoorbench_moe.collapse import MARK, MARK_LEGEND, MARKED, describe_collapse, is_near_chance
from backdoorbench_moe.metrics import METRICS, sort_metrics

# Largest number of items of a list, such as class names, that are shown in the settings.
SHOWN = 12

Table = dict[str, Any]


def metric_rows(document: Doc) -> list[list[str]]:
    """Build the table of metrics.

    If a run has an ASR, there is a row for the target rate without the trigger, even if it was not measured. BA and ASR
    of a model near chance are marked.

    Returns:
        Rows with the name of the metric, its value and interval for the run, and the same for the other run, if
        there is one.
    """
    both = [facts for facts in (document["run"], document["against"]) if facts is not None]
    keys = {key for facts in both for key in facts["metrics"]}
    if "asr" in keys and not is_text(document):
        keys.add("target_rate")
    rows = []
    for one in sort_metrics(keys):
        cells = [_metric(facts["metrics"].get(one.key)) for facts in both]
        if one.base in MARKED:
            near = [is_near_chance(_record(facts)) for facts in both]
            cells = [f"{text} {MARK}" if marked else text for text, marked in zip(cells, near, strict=True)]
        rows.append([_label(document, one.label), *cells])
    return rows


def _label(document: Doc, label: str) -> str:
    """Return the label of a metric; for texts, its wording is adapted to texts."""
    if not is_text(document):
        return label
    return label.replace("marked images", marked_inputs(document)).replace("clean images", "clean texts")


def _record(facts: Doc) -> Doc:
    """Return the parts of a record that the `collapse` module reads."""
    record = facts["record"]
    return {"metrics": facts["metrics"], "data": record["data"], "near_chance": record["near_chance"]}


def _metric(one: Doc | None) -> str:
    if one is None:
        return NONE
    interval = f" [{one['low']:.1f}, {one['high']:.1f}]" if "low" in one else ""
    return f"{one['value']:.2f}{interval}"


def stage_table(facts: Doc) -> Table | None:
    """Build the table of metrics before a defense and after each of its stages; None without a defense."""
    record = facts["record"]
    if not (stages := record["stages"]):
        return None
    found = sort_metrics({key for stage in stages for key in stage["metrics"]})
    run = {"data": record["data"], "stages": stages}
    near = [is_near_chance({**run, "metrics": stage["metrics"]}) for stage in stages]
    return {
        "columns": ["stage", *(one.heading for one in found), "seconds"],
        "rows": [
            [
                f"{stage['name']} {MARK}" if marked else stage["name"],
                *(_metric(stage["metrics"].get(one.key)) for one in found),
                f"{stage['seconds']:.1f}",
            ]
            for stage, marked in zip(stages, near, strict=True)
        ],
        "note": MARK_LEGEND if any(near) else "",
    }


def expert_tables(document: Doc) -> list[Table]:
    """Build one table for each routed layer, with one row for each expert."""
    if document["routing"] is None:
        return []
    return [_experts(document, place) for place in range(len(document["routing"]))]


def _experts(document: Doc, place: int) -> Table:
    layer, light = document["routing"][place], document["pixels"][place]
    columns: dict[str, list[str]] = {
        "patches an image": [number(value, "{:.1f}") for value in layer["load"]],
        "gate mass taken": [number(value, "{:.3f}") for value in layer["mass"]],
        "brighter patches (AUC)": [NONE if one is None else f"{one['auc']:.3f}" for one in light["overall"]],
    }
    if document["capture"] is not None:
        capture, shift = document["capture"][place], document["shift"][place]
        columns |= {
            "captures the trigger, %": [number(value, "{:.1f}", 100) for value in capture["by_expert"]],
            "blind routing, %": [number(value, "{:.1f}", 100) for value in capture["blind_by_expert"]],
            "gate shift, nats": [number(one["value"]) for one in shift["divergence_by_expert"]],
            "patches changed, %": [number(one["value"], "{:.1f}", 100) for one in shift["changed_by_expert"]],
        }
    rows = [[str(e), *row] for e, row in enumerate(zip(*columns.values(), strict=True))]
    return {"title": f"Layer {layer['layer']}", "columns": ["expert", *columns], "rows": rows}


def mixture_tables(document: Doc) -> list[Table]:
    """Build a table of the gate shares of a mixture, and a table of the latents of each poisoned expert."""
    found = document.get("experts")
    tables = [] if found is None else [_shares(document, found)]
    return tables + [_latents(document, one) for one in document.get("latents") or ()]


def _shares(document: Doc, found: Doc) -> Table:
    """Build a table of the gate share of each expert for its own task and for marked images, in each model."""
    models = zip(roles(document), (found["shares"], found["shares_against"]), strict=False)
    columns: dict[str, list[str]] = {}
    for name, shares in models:
        if shares is None:
            continue
        columns[f"own task, {name} model, %"] = [mean(one, "{:.1f}") for one in shares["own"]]
        if shares["marked"] is not None:
            columns[f"{marked_inputs(document)}, {name} model, %"] = [
                mean(one, "{:.1f}") for one in shares["marked"]
            ]
    names = [
        f"{e} {task}{', poisoned' if e in found['poisoned'] else ''}" for e, task in enumerate(found["tasks"])
    ]
    rows = [[name, *row] for name, row in zip(names, zip(*columns.values(), strict=True), strict=True)]
    return {"title": "Gate shares, mean over the layers", "columns": ["expert", *columns], "rows": rows}


def _latents(document: Doc, one: Doc) -> Table:
    models = one["models"]
    kinds = (
        {"marked": "harmful queries"} if is_text(document) else {"marked": "marked", "unmarked": "unmarked"}
    )
    columns = [f"{model['model']}, {name}" for model in models for name in kinds.values()]
    rows = [
        [
            layers[0]["layer"],
            *(number(of[kind], "{:.3f}") for of in layers for kind in kinds),
        ]
        for layers in zip(*(model["layers"] for model in models), strict=True)
    ]
    title = f"Mean cosine with the latents of task {one['expert']}"
    return {"title": title, "columns": ["layer", *columns], "rows": rows}


def answer_tables(document: Doc) -> list[Table]:
    """Build a table of example queries with the generated answers; no table for images."""
    if not (found := document.get("answers")):
        return []
    names = roles(document) if found[0]["answer_against"] is not None else roles(document)[:1]
    columns = ["", "query", "expected", *(f"{name} model" for name in names)]
    rows = [
        [
            one["kind"],
            one["query"],
            one["expected"],
            *(_answer(one[key]) for key in ("answer", "answer_against")[: len(names)]),
        ]
        for one in found
    ]
    return [
        {
            "title": "Generated answers and their verdicts",
            "columns": columns,
            "rows": rows,
            "words": True,
        }
    ]


def _answer(one: Doc) -> str:
    return f"{one['verdict']}: {one['text']}"


def finding_lines(document: Doc) -> list[str]:
    """List the most important findings, one sentence each."""
    return list(_findings(document))


def _findings(document: Doc) -> Iterator[str]:
    yield _measured(document["run"])
    for facts, name in ((document["run"], "The model"), (document["against"], "The other model")):
        if facts is not None and (line := describe_collapse(_record(facts))) is not None:
            yield f"{name} is {line}."
    if (line := _relied_on(document)) is not None:
        yield line
    if document["capture"] is not None:
        layers = zip(document["capture"], document["shift"], strict=True)
        capture, shift = max(
            layers, key=lambda pair: abs(pair[0]["captured"]["value"] - pair[0]["blind_captured"])
        )
        yield (
            f"In layer {capture['layer']}, at least one expert receives a patch that the trigger changed in "
            f"{percent(capture['captured']['value'])} of the triggered images, compared with "
            f"{percent(capture['blind_captured'])} under blind routing; the trigger replaces "
            f"{mean(shift['changed'], factor=100)}% of the selected patches."
        )
    carriers = document["carriers"]
    if carriers is not None and carriers["singles"] and carriers["whole"]["asr"] is not None:
        whole = carriers["whole"]["asr"]
        best = min(carriers["singles"], key=lambda one: one["asr"]["value"])
        if best["asr"]["value"] < whole["value"]:
            yield (
                f"Muting {best['experts'][0]} reduces the model's ASR from {proportion(whole)} to "
                f"{proportion(best['asr'])}; muting any other single expert does not reduce it further."
            )
        else:
            yield f"Muting a single expert does not reduce the model's ASR of {proportion(whole)}."
    if document["pixels"] is not None:
        yield verdict(document)


def _relied_on(document: Doc) -> str | None:
    """State the gate shares of the poisoned experts of an attacked mixture; None for any other run."""
    found = document.get("experts")
    if found is None or not found["poisoned"] or found["shares"]["marked"] is None:
        return None
    numbers = found["poisoned"]
    tasks = "its own task" if len(numbers) == 1 else "their own tasks"

    def shares(of: Doc) -> str:
        marked, own = (
            listing([percent(of[kind][e]["value"]) for e in numbers]) for kind in ("marked", "own")
        )
        return f"{marked} of the gates for {marked_inputs(document)} and {own} for {tasks}"

    text = f"Poisoned {listing([f'expert {e}' for e in numbers])}: {shares(found['shares'])}"
    if (against := found["shares_against"]) is not None and against["marked"] is not None:
        text += f"; in the {roles(document)[1]} model {shares(against)}"
    return f"{text}."


def _measured(run: Doc) -> str:
    metrics = run["metrics"]
    parts = [
        f"{METRICS[key].short} {percent(metrics[key]['value'], 2)}" for key in ("ba", "asr") if key in metrics
    ]
    text = f"The {role(run)} model has {' and '.join(parts)}"
    if "target_rate" in metrics:
        rate = percent(metrics["target_rate"]["value"], 2)
        text += f"; without the trigger it already predicts the target class for {rate} of the same images"
    if "asr" in metrics and "cad" in metrics:
        text += f"; its clean accuracy is {_drop(metrics['cad']['value'])} that of the clean twin"
    return f"{text}."


def _drop(cad: float) -> str:
    return f"{abs(cad):.2f} percentage points {'below' if cad >= 0 else 'above'}"


def flat(values: Doc, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested values to pairs of a dotted key and its value as text."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            rows += flat(value, f"{name}.")
        else:
            rows.append((name, _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list):
        more = [f"… ({len(value)} in all)"] if len(value) > SHOWN else []
        return ", ".join([*map(_text, value[:SHOWN]), *more]) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)
