"""What a report says in tables and in its first lines, from an analysis' document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backdoorbench_moe.analysis.figures.pixels import verdict
from backdoorbench_moe.analysis.figures.plate import Doc
from backdoorbench_moe.analysis.figures.words import NONE, mean, number, percent, proportion, role

METRICS = {
    "ba": "clean accuracy (BA)",
    "asr": "attack success rate (ASR)",
    "ra": "accuracy on triggered images (RA)",
    "cad": "clean accuracy drop (CAD)",
    "auroc": "area under the ROC curve (AUROC)",
    "tpr": "triggered images rejected (TPR)",
    "fpr": "clean images rejected (FPR)",
}
# Of a list in the settings, such as class names, so many are shown.
SHOWN = 12

Table = dict[str, Any]


def metric_rows(document: Doc) -> list[list[str]]:
    """Metric, then value with interval and number of images, of the run and of the other."""
    both = [facts for facts in (document["run"], document["against"]) if facts is not None]
    return [
        [text, *(_metric(facts["metrics"].get(name)) for facts in both)]
        for name, text in METRICS.items()
        if any(name in facts["metrics"] for facts in both)
    ]


def _metric(one: Doc | None) -> str:
    if one is None:
        return NONE
    interval = f" [{one['low']:.1f}, {one['high']:.1f}]" if "low" in one else ""
    return f"{one['value']:.2f}{interval}"


def stage_table(facts: Doc) -> Table | None:
    """BA, ASR and RA before a defense and after each of its stages."""
    if not (stages := facts["record"]["stages"]):
        return None
    names = [name for name in METRICS if any(name in stage["metrics"] for stage in stages)]
    return {
        "columns": ["stage", *(name.upper() for name in names), "seconds"],
        "rows": [
            [
                stage["name"],
                *(_metric(stage["metrics"].get(name)) for name in names),
                f"{stage['seconds']:.1f}",
            ]
            for stage in stages
        ],
    }


def expert_tables(document: Doc) -> list[Table]:
    """One table a routed layer, one expert a row."""
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
            "if blind, %": [number(value, "{:.1f}", 100) for value in capture["blind_by_expert"]],
            "gate shift, nats": [number(one["value"]) for one in shift["divergence_by_expert"]],
            "patches changed, %": [number(one["value"], "{:.1f}", 100) for one in shift["changed_by_expert"]],
        }
    rows = [[str(e), *row] for e, row in enumerate(zip(*columns.values(), strict=True))]
    return {"title": f"Layer {layer['layer']}", "columns": ["expert", *columns], "rows": rows}


def finding_lines(document: Doc) -> list[str]:
    """The most important of it, a sentence each."""
    return list(_findings(document))


def _findings(document: Doc) -> Iterator[str]:
    run, metrics = document["run"], document["run"]["metrics"]
    if "asr" in metrics:
        text = f"The {role(run)} model has BA {percent(metrics['ba']['value'], 2)} and ASR "
        text += percent(metrics["asr"]["value"], 2)
        if "cad" in metrics:
            text += f"; its clean accuracy is {_drop(metrics['cad']['value'])} the clean twin's"
        yield f"{text}."
    else:
        yield f"The {role(run)} model has BA {percent(metrics['ba']['value'], 2)}."
    if document["capture"] is not None:
        layers = zip(document["capture"], document["shift"], strict=True)
        capture, shift = max(
            layers, key=lambda pair: abs(pair[0]["captured"]["value"] - pair[0]["blind_captured"])
        )
        yield (
            f"In layer {capture['layer']} an expert receives a patch that the trigger changed in "
            f"{percent(capture['captured']['value'])} of the triggered images, where blind routing would "
            f"give {percent(capture['blind_captured'])}; the trigger exchanges "
            f"{mean(shift['changed'], factor=100)}% of the selected patches."
        )
    carriers = document["carriers"]
    if carriers is not None and carriers["whole"]["asr"] is not None:
        best = min(carriers["singles"], key=lambda one: one["asr"]["value"])
        yield (
            f"Without {best['experts'][0]} the model's ASR is {proportion(best['asr'])} instead of "
            f"{proportion(carriers['whole']['asr'])}: the lowest that muting one expert reaches."
        )
    if document["pixels"] is not None:
        yield verdict(document)


def _drop(cad: float) -> str:
    return f"{abs(cad):.2f} points {'below' if cad >= 0 else 'above'}"


def flat(values: Doc, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted keys and texts."""
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
