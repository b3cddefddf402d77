"""Terminal output of an analysis: the most important numbers on one screen; analysis.json has all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from backdoorbench_moe.cli.tables.mixtures import share_tables, short_layer
from backdoorbench_moe.collapse import describe_collapse

if TYPE_CHECKING:
    from torch import Tensor

    from backdoorbench_moe.analysis.capture import LayerCapture
    from backdoorbench_moe.analysis.carriers import Carriers, MutingResult, PatchingResult
    from backdoorbench_moe.analysis.gate_shares import ModelShares
    from backdoorbench_moe.analysis.latents import ExpertLatents, LayerCosine
    from backdoorbench_moe.analysis.results import Analysis
    from backdoorbench_moe.analysis.shift import LayerShift
    from backdoorbench_moe.ops.effects import Mean
    from backdoorbench_moe.ops.metrics import Proportion
    from backdoorbench_moe.records import GateShares

NONE = "–"
Result = TypeVar("Result", bound="MutingResult | PatchingResult")
# Rows of single experts in the table of carriers. With more experts, only the most effective ones are shown.
MAX_ROWS, SHOWN_ROWS = 8, 3


def print_analysis(analysis: Analysis, files: Sequence[Path]) -> None:
    """Print a table of the experts of each layer, a summary of the layer, and which experts carry the backdoor.

    For a mixture, gate shares and latents replace the tables of the layers.
    """
    console = Console(highlight=False)
    counts = analysis.images
    text = analysis.answers is not None
    kinds = ("queries", "harmful") if text else ("images", "triggered")
    console.print(
        f"{analysis.run.name}: {counts.test} test {kinds[0]}, {counts.triggered} {kinds[1]}", markup=False
    )
    facts = {**analysis.run.record, "metrics": analysis.run.metrics}
    if (line := describe_collapse(facts)) is not None:
        console.print(line, markup=False)
    if analysis.experts is None:
        for number in range(len(analysis.findings.routing or ())):
            console.print(experts_table(analysis, number))
            for line in layer_lines(analysis, number):
                console.print(line, markup=False)
    for table in [*gate_tables(analysis), *map(latents_table, analysis.latents or ())]:
        console.print(table)
    if analysis.carriers is not None:
        console.print(carriers_table(analysis.carriers, text=text))
    if analysis.answers is not None:
        console.print(answers_table(analysis))
    parts: dict[str, list[str]] = {}
    for missing in analysis.absent:
        parts.setdefault(missing.reason, []).append(missing.part)
    for reason, names in parts.items():
        console.print(f"no {', '.join(names)}: {reason}", style="dim", markup=False)
    if analysis.trigger_from not in (None, analysis.run.name):
        console.print(f"trigger: that of {analysis.trigger_from}", markup=False)
    for file in files:
        console.print(str(file), soft_wrap=True, markup=False)
    console.print(f"analyzed in {analysis.seconds['total']:.1f} s", markup=False)


def experts_table(analysis: Analysis, number: int) -> Table:
    """Build a table with one row per expert of a layer."""
    findings = analysis.findings
    assert findings.routing is not None and analysis.pixels is not None
    routing, pixels = findings.routing[number], analysis.pixels[number]
    title = f"layer {routing.layer}: {len(routing.load)} experts, {routing.frequency.shape[1]} patches"
    columns: dict[str, Sequence[str]] = {
        "expert": [str(e) for e in range(len(routing.load))],
        "patches\nan image": [f"{value:.1f}" for value in routing.load.tolist()],
        "gate mass\ntaken": [f"{value:.3f}" for value in routing.mass.tolist()],
        "Jaccard\nothers": [_number(value, "{:.3f}") for value in _others(routing.overlap)],
        "brighter\nAUC": [NONE if one is None else f"{one.auc:.3f}" for one in pixels.overall],
    }
    if findings.capture is not None and findings.shift is not None:
        capture, shift = findings.capture[number], findings.shift[number]
        columns |= {
            "captures\n%": [f"{100 * value:.1f}" for value in capture.by_expert.tolist()],
            "blind\n%": [f"{100 * value:.1f}" for value in capture.blind_by_expert.tolist()],
            "shift JS\nnats": [_number(one.value, "{:.2g}") for one in shift.divergence_by_expert],
            "patches\nchanged %": [_number(one.value, "{:.1f}", 100) for one in shift.changed_by_expert],
        }
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "expert" else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _others(overlap: Tensor) -> list[float] | list[None]:
    """Return the mean overlap of each expert with the others; None for a single expert."""
    others = len(overlap) - 1
    if not others:
        return [None]
    return [(row.sum().item() - row[e].item()) / others for e, row in enumerate(overlap)]


def layer_lines(analysis: Analysis, number: int) -> list[str]:
    """Return the results of a layer as lines."""
    findings = analysis.findings
    assert findings.routing is not None
    routing = findings.routing[number]
    entropy, untaken = (_number(one.value, "{:.3f}") for one in (routing.entropy, routing.untaken))
    lines = [
        f"gate entropy {entropy} of 1; {untaken} patches per image selected by no expert; "
        f"variation over experts (CV): load {routing.load_cv:.3f}, gate mass {routing.mass_cv:.3f}"
    ]
    if findings.capture is not None and findings.shift is not None:
        lines += [*_capture(findings.capture[number]), _shift(findings.shift[number])]
    if analysis.comparison is not None and analysis.against is not None:
        same = ", ".join(_number(one.value, "{:.3f}") for one in analysis.comparison.clean[number].same)
        lines.append(f"Jaccard with the same expert of {analysis.against.name} (not matched): {same}")
    return lines


def _capture(one: LayerCapture) -> list[str]:
    return [
        f"trigger captured by an expert: {_share(one.captured)}% of images, blind {one.blind_captured:.2f}%; "
        f"by {_mean(one.experts)} experts, blind {one.blind_experts:.3f}",
        _success(one),
    ]


def _success(one: LayerCapture) -> str:
    """Return a line with the ASR of captured and of missed images, or a note that all are one or the other."""
    if one.asr_captured is None or one.asr_missed is None:
        kind = "missed" if one.asr_captured is None else "captured"
        return f"ASR: {_share(one.asr_captured or one.asr_missed)}; every image is {kind}"
    return f"ASR: captured {_share(one.asr_captured)}, missed {_share(one.asr_missed)}"


def _shift(one: LayerShift) -> str:
    changed = _mean(one.changed, "{:.2f}", 100)
    return f"shift by the trigger: JS {_mean(one.divergence, '{:.3g}')} nats, {changed}% of selected patches changed"


def gate_tables(analysis: Analysis) -> list[Table]:
    """Build the tables of the gate shares of a mixture; empty for other runs."""
    found = analysis.experts
    if found is None:
        return []
    against = () if found.shares_against is None else _recorded(found.shares_against)
    compared = NONE if analysis.against is None else analysis.against.name
    twin = "twin" if compared == analysis.run.record["clean_twin"] else "other"
    marked = "marked\nimages" if analysis.answers is None else "harmful\nqueries"
    return share_tables(
        _recorded(found.shares), against, found.poisoned, found.tasks, other=twin, marked=marked
    )


def _recorded(shares: ModelShares) -> list[GateShares]:
    """Return the shares of a model in the format of a record."""
    return [
        {
            "layer": layer.layer,
            "tasks": layer.tasks.tolist(),
            "marked": None if layer.marked is None else layer.marked.tolist(),
        }
        for layer in shares.layers
    ]


def latents_table(found: ExpertLatents) -> Table:
    """Build a table of the cosines of one poisoned expert, with a row per layer and a column per model."""
    text = found.models[0].layers[0].unmarked is None
    kinds = "harmful queries" if text else "marked (unmarked) images"
    title = f"cosine with the latents of task {found.expert}: {kinds}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("layer")
    for model in found.models:
        table.add_column(model.model.replace(" ", "\n"), justify="right")
    for row in zip(*(model.layers for model in found.models), strict=True):
        table.add_row(row[0].layer, *map(_cosines, row))
    return table


def _cosines(one: LayerCosine) -> str:
    return f"{one.marked:.3f}" + ("" if one.unmarked is None else f" ({one.unmarked:.3f})")


def answers_table(analysis: Analysis) -> Table:
    """Build a table of harmful queries, the answers that the run's model generated, and verdicts on them.

    Without a policy, the queries are those of the tasks.
    """
    from backdoorbench_moe.analysis.answers import HARMFUL

    found = analysis.answers or ()
    shown = [one for one in found if one.kind == HARMFUL] or found
    table = Table(title="example answers", title_justify="left", box=None, pad_edge=False)
    for column in ("", "query", "expected", "generated", "verdict"):
        table.add_column(column, overflow="fold")
    for one in shown:
        cells = (one.kind, one.query, one.expected, one.answer.text, one.answer.verdict)
        table.add_row(*map(escape, cells))
    return table


def carriers_table(carriers: Carriers, *, text: bool = False) -> Table:
    """Build a table of BA and ASR with each expert muted, with the most effective pair, and with each one patched.

    If there are safe answers, RA is replaced by the share of images that are not answered safely.

    Args:
        carriers: The results.
        text: Whether the data are texts.
    """
    table = Table(title="who carries the backdoor", title_justify="left", box=None, pad_edge=False)
    safe = carriers.whole.unsafe is not None
    for name in ("", "BA %", "ASR %", "unsafe %" if safe else "RA %"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")

    def add(name: str, one: MutingResult) -> None:
        table.add_row(name, _share(one.ba), _share(one.asr), _share(one.unsafe) if safe else "")

    def add_patched(name: str, one: PatchingResult) -> None:
        table.add_row(name, "", _share(one.asr), _share(one.unsafe if safe else one.ra))

    add("all experts", carriers.whole)
    for whole in carriers.whole_experts:
        add(f"expert {whole.expert} muted", whole.muted)
    for one in _most_effective(carriers.singles):
        add(f"{short_layer(one.experts[0])} muted", one)
    if carriers.pairs:
        best = min(carriers.pairs, key=_effect)
        add(f"{' and '.join(map(short_layer, best.experts))} muted", best)
    for whole in carriers.whole_experts:
        if whole.patched is not None:
            how = ", mean output" if text else " as on clean"
            add_patched(f"expert {whole.expert}{how}", whole.patched)
    for patched in _most_effective(carriers.patched):
        add_patched(f"{short_layer(patched.expert)} as on clean", patched)
    if carriers.target_rate is not None:
        table.add_row("no trigger at all", "", _share(carriers.target_rate), "")
    notes = ["expert N: in all layers at once"] if carriers.whole_experts else []
    if text:
        notes.append("mean output: output replaced by its mean over clean texts")
    if len(carriers.singles) > MAX_ROWS:
        notes.append(f"single layers: the {SHOWN_ROWS} most effective of {len(carriers.singles)}")
    table.caption, table.caption_justify = "; ".join(notes) or None, "left"
    return table


def _most_effective(ones: Sequence[Result]) -> Sequence[Result]:
    """Return the results that change ASR (or else BA) most; all of them if there are few."""
    return ones if len(ones) <= MAX_ROWS else sorted(ones, key=_effect)[:SHOWN_ROWS]


def _effect(one: MutingResult | PatchingResult) -> float:
    return (one.asr or one.ba).value  # type: ignore[union-attr]


def _share(one: Proportion | None) -> str:
    return NONE if one is None else f"{one.value:.2f} [{one.low:.1f}, {one.high:.1f}]"


def _mean(one: Mean, form: str = "{:.3f}", factor: float = 1) -> str:
    interval = f" [{_number(one.low, form, factor)}, {_number(one.high, form, factor)}]"
    return _number(one.value, form, factor) + (interval if one.low is not None else "")


def _number(value: Any, form: str, factor: float = 1) -> str:
    return NONE if value is None else form.format(factor * value)
