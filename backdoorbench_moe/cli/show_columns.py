"""The columns that `bbmoe show` can print and sort by, and their values in a run's record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backdoorbench_moe.collapse import MARK, MARKED, collapsed
from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.metrics import METRICS, PERCENT
from backdoorbench_moe.records import Record, RunFolder

NONE = "–"


@dataclass(frozen=True)
class ShownRun:
    """A run to be shown.

    Attributes:
        folder: Its folder.
        record: What was read from it.
        status: Its status now; see `engine.status`.
    """

    folder: RunFolder
    record: Record
    status: str


@dataclass(frozen=True)
class Column:
    """A column of the table of runs.

    Attributes:
        key: What `--columns` and `--sort` call it.
        title: Its heading.
        value: The value of a run, a text or a number; None if it has none.
        text: The value as it is printed.
    """

    key: str
    title: str
    value: Callable[[ShownRun], Any]
    text: Callable[[ShownRun], str]


def choose_columns(keys: Sequence[str] | None, runs: Sequence[ShownRun], *, intervals: bool) -> list[Column]:
    """The columns of these keys, or those that say something of these runs.

    Args:
        keys: Names from `list_columns`, or dotted keys of the spec or the record (`train.lr`,
            `timing.total_seconds`); None for the usual ones, metrics and defense only if a run has them.
        runs: The runs to be shown.
        intervals: Whether metrics are printed with their 95% interval.

    Raises:
        UnknownNameError: A key is neither a column nor in any of the records.
    """
    known = {column.key: column for column in list_columns(intervals=intervals)}
    if keys is None:
        optional = {"run", "defense", *METRICS}
        used = {key for key in known if any(known[key].value(run) is not None for run in runs)}
        if "asr" in used:
            used.add(
                "target_rate"
            )  # What ASR is worth is seen beside it, and where it was not measured, too.
        return [known[key] for key in known if key not in optional or (key in used and key != "run")]
    return [known[key] if key in known else _dotted(key, runs, list(known)) for key in keys]


def list_columns(*, intervals: bool = False) -> list[Column]:
    """All columns with a name of their own, in the order in which they are printed."""
    values: dict[str, Callable[[ShownRun], Any]] = {
        "run": lambda run: run.folder.path.name,
        "status": lambda run: run.status,
        "data": lambda run: run.record.run_spec.dataset.name,
        "model": lambda run: run.record.run_spec.model.name,
        "trigger": _trigger,
        "applicator": lambda run: _part(run.record.spec["applicator"]) or None,
        "poison": lambda run: run.record.run_spec.poison.rate or None,
        "defense": lambda run: " + ".join(map(_part, run.record.spec.get("defenses", []))) or None,
        "seed": lambda run: run.record.run_spec.seed,
        "epochs": lambda run: run.record.run_spec.train.epochs,
    }
    texts = {"poison": _rate}
    columns = [Column(key, key, value, texts.get(key) or _text_of(value)) for key, value in values.items()]
    return columns + [_metric(key, intervals=intervals) for key in METRICS]


def _metric(key: str, *, intervals: bool) -> Column:
    def text(run: ShownRun) -> str:
        metric = run.record.metrics.get(key)
        if metric is None:
            return NONE
        bounds = f" [{metric['low']:.1f}, {metric['high']:.1f}]" if intervals and "low" in metric else ""
        mark = f" {MARK}" if key in MARKED and collapsed(run.record) else ""
        return f"{metric['value']:.2f}{bounds}{mark}"

    unit = " %" if METRICS[key].unit == PERCENT else ""
    return Column(
        key, f"{METRICS[key].heading}{unit}", lambda run: run.record.metrics.get(key, {}).get("value"), text
    )


def _dotted(key: str, runs: Sequence[ShownRun], known: Sequence[str]) -> Column:
    def value(run: ShownRun) -> Any:
        found = _look_up(run.record.spec, key)
        return found if found is not None else _look_up(asdict(run.record), key)

    if all(value(run) is None for run in runs):
        hint = "; or a dotted key of the spec or record, such as train.lr or timing.total_seconds"
        raise UnknownNameError("column", key, known, hint)
    return Column(key, key, value, _text_of(value))


def _look_up(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _text_of(value: Callable[[ShownRun], Any]) -> Callable[[ShownRun], str]:
    def text(run: ShownRun) -> str:
        found = value(run)
        if isinstance(found, dict):
            return _part(found) or NONE
        return NONE if found is None else f"{found:.6g}" if isinstance(found, float) else str(found)

    return text


def _trigger(run: ShownRun) -> str | None:
    return _part(run.record.spec["trigger"]) or (None if run.record.run_spec.attacked else "clean")


def _rate(run: ShownRun) -> str:
    rate = run.record.run_spec.poison.rate
    return f"{100 * rate:g}%" if rate else NONE


def _part(values: dict[str, Any] | None) -> str:
    """A part's name and options in one line; "" for no part."""
    return ", ".join(str(item) if key == "name" else f"{key}={item}" for key, item in (values or {}).items())
