"""Display of a run in notebooks and interactive sessions."""

from __future__ import annotations

from html import escape

from backdoorbench_moe.collapse import collapse_line
from backdoorbench_moe.metrics import Metric, sort_metrics
from backdoorbench_moe.records import Record


def run_line(name: str, record: Record) -> str:
    """Format a run as one line: the name of its folder, its status and its metrics."""
    metrics = [
        f"{one.heading} {record.metrics[one.key]['value']:.2f}" for one in sort_metrics(record.metrics)
    ]
    near = ["near chance"] if collapse_line(record) else []
    return f"<Run {name}: {', '.join([record.status, *metrics, *near])}>"


def run_html(name: str, record: Record) -> str:
    """Format a run as an HTML table of its metrics in percent, with 95% intervals and numbers of images."""
    rows = "".join(_row(one, record.metrics[one.key]) for one in sort_metrics(record.metrics))
    notes = "".join(f"<p>{escape(note)}</p>" for note in (record.error, collapse_line(record)) if note)
    head = "<tr><th></th><th>%</th><th>95% interval</th><th>images</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else ""
    return f"<p><code>{escape(name)}</code>: {escape(record.status)}</p>{notes}{table}"


def _row(metric: Metric, found: dict[str, float]) -> str:
    interval = f"{found['low']:.2f} – {found['high']:.2f}" if "low" in found else "–"
    cells = (f"{found['value']:.2f}", interval, f"{found['n']:,}")
    label = f"<th>{escape(metric.label)}</th>"
    return f"<tr>{label}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
